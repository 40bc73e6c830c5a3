"""Initial weights of a router: uniform, from example texts of each expert, or from labelled text.

The classifier is made to compute one linear map of the base model's last hidden state h, exactly, whatever its depth:

    z = scale · (W h + b)

through ReLU layers by pairs of units, relu(a) − relu(−a) = a. The other units keep their random weights and reach the
output with weight zero, so that training can use them.

H: hidden size. E: experts. N: tokens. L: adapted layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, DataError, UnsupportedOperationError
from loramix.experts.base_layers import device_of
from loramix.model.build import XLoraModel
from loramix.passes.hooks import EXPERT_IDS, RoutingHook
from loramix.passes.state import observing, state_of
from loramix.routers.classifier import XLoraClassifier
from loramix.routers.gating import gating_of
from loramix.training.data import check_expert_ids, read_text
from loramix.training.losses import IGNORED

Method = Literal["zeros", "prompts", "labels"]


@dataclass(frozen=True)
class LinearRouter:
    """z = scale · (W h + b).

    Attributes:
        weight: W.
        bias: b.
        scale: the factor that sets how sharp the softmax of z is.
        accuracy: the share of the tokens it was made from whose expert has the largest logit.
    """

    weight: Float[Tensor, "E H"]
    bias: Float[Tensor, " E"]
    scale: float
    accuracy: float


def init_router(
    model: XLoraModel,
    method: Method,
    *,
    tokenizer: Any = None,
    prompts: Mapping[str, str | Path | Sequence[str]] | None = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
) -> LinearRouter | None:
    """Set the weights of a mixture's router.

    Args:
        model: the mixture.
        method: "zeros": every expert gets the same scaling, for every token. "prompts": a linear discriminant of the
            mean hidden states of a few texts for each expert. "labels": ridge regression onto the experts of labelled
            text, in closed form.
        tokenizer: for "prompts": a transformers tokenizer.
        prompts: for "prompts": expert name -> a text, several, or the `Path` of a file with one; for every expert.
        batches: for "labels": `input_ids`, `attention_mask` and `expert_ids` (B,) or (B, S), -1 where unknown.

    Returns:
        The linear map that the router now computes; None with "zeros".

    Raises:
        ConfigurationError: another method, arguments that do not belong to it, or a router that is too narrow.
        DataError: an expert without text, a name that is no expert's, or a file that cannot be read.
        UnsupportedOperationError: "prompts" or "labels" for an encoder–decoder.
    """
    needed = {"zeros": (), "prompts": ("tokenizer", "prompts"), "labels": ("batches",)}
    given = {"tokenizer": tokenizer, "prompts": prompts, "batches": batches}
    if method not in needed or {name for name, value in given.items() if value is not None} != set(needed[method]):
        raise ConfigurationError(
            'init_router takes "zeros", "prompts" with tokenizer= and prompts=, or "labels" with batches=.',
            received=f"method={method!r} with {', '.join(n for n, v in given.items() if v is not None) or 'nothing'}",
            remedy='Call for example init_router(model, "prompts", tokenizer=tokenizer, prompts={"math": ["…"], …}).',
        )
    classifier = model.router
    if not isinstance(classifier, XLoraClassifier):
        raise ConfigurationError(
            "init_router sets the weights of X-LoRA's classifier.",
            received=f"router={classifier.kind!r}",
            remedy='Use router="classifier", or set the weights of this router by its own methods.',
        )
    _check_layers(classifier.config)
    if method == "zeros":
        _write_constant(classifier)
        return None
    if state_of(model).has_encoder:
        raise UnsupportedOperationError(
            "A router is computed from texts where one backbone reads them.",
            received=f"method={method!r} for a {type(model).__name__}, whose encoder and decoder read a text each",
            remedy='Use method="zeros", and train the router.',
        )
    moments = _Moments(model)
    for batch in (batches or ()) if prompts is None else _labelled(model, tokenizer, prompts):
        moments.add(batch)
    router = moments.discriminant() if method == "prompts" else moments.regression()
    write_linear(classifier, router)
    return router


def write_linear(classifier: XLoraClassifier, router: LinearRouter) -> None:
    """Make the classifier compute z = scale · (W h + b), the same in every layer.

    Raises:
        ConfigurationError: hidden layers with fewer than 2 E units.
    """
    experts = len(router.bias)
    check_width(classifier.config, experts)
    linears = [module for module in classifier.layers if isinstance(module, nn.Linear)]
    weight, bias = router.scale * router.weight, router.scale * router.bias
    repeats = linears[-1].out_features // experts
    with torch.no_grad():
        if len(linears) == 1:
            _fill(linears[0], weight.repeat(repeats, 1), bias.repeat(repeats))
            return
        _fill_rows(linears[0], torch.cat([weight, -weight]), torch.cat([bias, -bias]))
        pairs = torch.eye(2 * experts)
        for linear in linears[1:-1]:
            rows = torch.zeros(2 * experts, linear.in_features)
            rows[:, : 2 * experts] = pairs
            _fill_rows(linear, rows, torch.zeros(2 * experts))
        out = torch.zeros(experts, linears[-1].in_features)
        out[:, : 2 * experts] = torch.cat([torch.eye(experts), -torch.eye(experts)], dim=1)
        _fill(linears[-1], out.repeat(repeats, 1), torch.zeros(experts * repeats))


def check_width(config: XLoraConfig, experts: int) -> None:
    """Raises ConfigurationError: hidden layers with fewer than 2 E units carry no linear map."""
    _check_layers(config)
    if config.xlora_depth > 1 and config.xlora_size < 2 * experts:
        raise ConfigurationError(
            "A router with hidden layers carries a linear map through pairs of units, two for each expert.",
            received=f"xlora_size={config.xlora_size} for {experts} experts",
            remedy=f"Use xlora_size={2 * experts} or more, or xlora_depth=1.",
        )


def _check_layers(config: XLoraConfig) -> None:
    """Raises ConfigurationError: a classifier without biases, or without ReLU."""
    if not (config.use_bias and config.enable_relu_and_dropout):
        raise ConfigurationError(
            "The start of a router is written into a classifier with biases and ReLU.",
            received=f"use_bias={config.use_bias}, enable_relu_and_dropout={config.enable_relu_and_dropout}",
            remedy="Leave both settings out, or train from a random start.",
        )


def _write_constant(classifier: XLoraClassifier) -> None:
    """Zero logits; where logits are the scalings themselves, 1 / E."""
    last = [module for module in classifier.layers if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(gating_of(classifier.config).uniform(classifier.n_classes))


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _fill_rows(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight[: len(weight)] = weight.to(linear.weight)
    linear.bias[: len(bias)] = bias.to(linear.bias)


class _Reader(RoutingHook):
    """Holds the scaling pass's last hidden states of one forward."""

    hidden: Tensor

    def keep(self, inputs: Mapping[str, Any], hidden: Tensor) -> None:
        self.hidden = hidden


@torch.no_grad()
def hidden_states(model: XLoraModel, batch: Mapping[str, Tensor]) -> Float[Tensor, "B S H"]:
    """The router's input: the scaling pass's last hidden states of a batch, in evaluation mode."""
    reader = _Reader()
    inputs = {name: batch[name].to(device_of(model)) for name in ("input_ids", "attention_mask") if name in batch}
    with observing(model, reader):
        model.base_model(**inputs, use_cache=False)
    return reader.hidden


class _Moments:
    """Sums over the labelled tokens, in float64, from which both methods compute the router."""

    def __init__(self, model: XLoraModel) -> None:
        self.model = model
        self.config = model.active_peft_config
        self.names = model.expert_names
        size, experts = self.config.hidden_size + 1, len(self.names)
        self.second = torch.zeros(size, size, dtype=torch.float64)  # Σ h hᵀ, h with a 1 behind it
        self.cross = torch.zeros(experts, size, dtype=torch.float64)  # Σ over each expert's tokens of h
        self._sample: list[tuple[Tensor, Tensor]] = []
        self._sampled = 0

    def add(self, batch: Mapping[str, Tensor]) -> None:
        hidden = hidden_states(self.model, batch).float().cpu()
        ids = batch[EXPERT_IDS].cpu()
        check_expert_ids(ids, len(self.names))
        ids = (ids if ids.dim() == 2 else ids.unsqueeze(1)).expand(hidden.shape[:2])
        known = ids != IGNORED
        if "attention_mask" in batch:
            known = known & batch["attention_mask"].cpu().bool()
        h, e = hidden[known], ids[known]
        wide = torch.cat([h, h.new_ones(len(h), 1)], dim=1).double()
        self.second += wide.T @ wide
        self.cross += torch.zeros(len(self.names), len(h), dtype=torch.float64).scatter(0, e.unsqueeze(0), 1.0) @ wide
        if self._sampled < _SAMPLE:
            self._sample.append((h[:_SAMPLE], e[:_SAMPLE]))
            self._sampled += len(h)

    def discriminant(self) -> LinearRouter:
        """w_e = Σ⁻¹ μ_e, b_e = −½ μ_eᵀ Σ⁻¹ μ_e, with Σ the covariance within the experts' texts, shrunk.

        Source: Fisher's linear discriminant with equal priors; shrinkage as in Ledoit and Wolf (2004), fixed.
        """
        counts, means = self._means()
        total = counts.sum()
        within = self.second[:-1, :-1] / total - (means.T * (counts / total)) @ means
        size = len(within)
        target = torch.eye(size, dtype=torch.float64) * within.diagonal().mean()
        shrunk = (1 - _SHRINKAGE) * within + _SHRINKAGE * target
        weight = torch.linalg.solve(shrunk, means.T).T
        bias = -0.5 * (weight * means).sum(1)
        return self._scaled(weight, bias)

    def regression(self) -> LinearRouter:
        """[W b] = Y Hᵀ (H Hᵀ + λ I)⁻¹, Y one-hot: ridge regression onto the experts."""
        self._means()
        size = len(self.second)
        ridge = _RIDGE * self.second.diagonal()[:-1].mean() * torch.eye(size, dtype=torch.float64)
        ridge[-1, -1] = 0.0
        both = torch.linalg.solve(self.second + ridge, self.cross.T).T
        return self._scaled(both[:, :-1], both[:, -1])

    def _means(self) -> tuple[Tensor, Tensor]:
        counts = self.cross[:, -1]
        empty = [name for name, count in zip(self.names, counts.tolist(), strict=True) if not count]
        if empty:
            raise DataError(
                "Every expert needs some text to make a router from.",
                received=f"no token for {', '.join(map(repr, empty))}",
                remedy="Give a few texts for each expert.",
            )
        return counts, self.cross[:, :-1] / counts.unsqueeze(1)

    def _scaled(self, weight: Tensor, bias: Tensor) -> LinearRouter:
        """Choose the scale with which the softmax predicts the experts best; 1 where logits are the scalings."""
        h, e = (torch.cat(parts)[:_SAMPLE] for parts in zip(*self._sample, strict=True))
        logits = h @ weight.float().T + bias.float()
        accuracy = float((logits.argmax(-1) == e).float().mean())
        gating = gating_of(self.config)
        temperature = gating.temperature if gating.softmax else 1.0
        scale = temperature * _best_scale(logits, e) if gating.normalised else 1.0
        return LinearRouter(weight.float(), bias.float(), scale, accuracy)


_SAMPLE = 20_000
_SHRINKAGE = 0.1
_RIDGE = 1e-3
_SMOOTHING = 0.1  # without it the router could saturate, and would have no gradient


def _best_scale(logits: Float[Tensor, "N E"], experts: Int[Tensor, " N"]) -> float:
    """The factor that minimises the cross-entropy, by golden section over its logarithm; there is one minimum."""

    def nats(log_scale: float) -> float:
        scaled = math.exp(log_scale) * logits
        return float(nn.functional.cross_entropy(scaled, experts, label_smoothing=_SMOOTHING))

    low, high, ratio = math.log(1e-3), math.log(1e3), (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if nats(left) < nats(right) else (left, high)
    return math.exp((low + high) / 2)


def _labelled(
    model: XLoraModel, tokenizer: Any, prompts: Mapping[str, str | Path | Sequence[str]]
) -> Iterable[Mapping[str, Tensor]]:
    texts = prompt_texts(prompts, model.expert_names)
    for number, name in enumerate(model.expert_names):
        for text in texts[name]:
            ids = tokenizer(text, return_tensors="pt", truncation=tokenizer.model_max_length < _NO_LIMIT)["input_ids"]
            yield {"input_ids": ids, EXPERT_IDS: torch.full((1,), number)}


def prompt_texts(prompts: Mapping[str, str | Path | Sequence[str]], names: Sequence[str]) -> dict[str, list[str]]:
    """Expert name -> texts, from texts and files.

    Raises:
        DataError: an expert without text, a name that is no expert's, or a file that cannot be read.
    """
    if set(prompts) != set(names):
        raise DataError(
            "prompts holds texts for each expert of the mixture, and for no other.",
            received=f"texts for {', '.join(map(repr, prompts)) or 'nobody'}; experts {', '.join(map(repr, names))}",
            remedy="Use the experts' names as keys.",
        )
    found: dict[str, list[str]] = {}
    for name in names:
        given = prompts[name]
        found[name] = [read_text(given)] if isinstance(given, Path) else [given] if isinstance(given, str) else [*given]
        if not found[name] or not all(text.strip() for text in found[name]):
            raise DataError(
                "Every expert has a text to make a router from, and none is blank.",
                received=f"{name!r}: {given!r}"[:200],
                remedy="Give a few texts for each expert.",
            )
    return found


_NO_LIMIT = 10**9
"""Tokenizers without a limit have a `model_max_length` far above this."""
