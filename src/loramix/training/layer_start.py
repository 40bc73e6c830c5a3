"""Starts of layer routers: what each layer's low-rank activation tells, in closed form.

B, S: batch, sequence. N: tokens. L: adapted layers. E: experts. R: total rank of a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loramix.errors import DataError
from loramix.evaluation.losses import token_nats
from loramix.experts.base_layers import device_of
from loramix.experts.layer_use import TokenOrder
from loramix.layers.routing import LayerRouting
from loramix.layers.slot import Override, override
from loramix.model.build import XLoraModel
from loramix.model.peft_methods import layers_of
from loramix.passes.hooks import EXPERT_IDS
from loramix.passes.one_pass import by_text
from loramix.passes.state import evaluating, state_of
from loramix.routers.linear import LinearRouter, normalised
from loramix.routers.norm import NormRouter
from loramix.routers.start import Sample, best_scale
from loramix.training.data import check_expert_ids
from loramix.training.losses import IGNORED

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerStart:
    """What a linear router was fitted to.

    Attributes:
        accuracy: for each layer the share of the tokens it was made from whose expert has the largest logit; of many,
            of a sample.
    """

    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What a norm router gives on the text that it was calibrated on.

    Attributes:
        loss: nats a token.
        uniform: that of the uniform mixture.
    """

    loss: float
    uniform: float


class Moments:
    """Sums over tokens, in float64, from which each layer's ridge regression onto some targets follows.

        [W b] = Y Hᵀ (H Hᵀ + λ I)⁻¹, H the columns h / rms(h) with a 1 behind them, Y the targets

    Args:
        ranks: R of each layer.
        experts: E.
    """

    def __init__(self, ranks: Sequence[int], experts: int) -> None:
        self.second = [torch.zeros(rank + 1, rank + 1, dtype=torch.float64) for rank in ranks]
        self.cross = [torch.zeros(experts, rank + 1, dtype=torch.float64) for rank in ranks]

    def add(self, layer: int, h: Float[Tensor, "N R"], targets: Float[Tensor, "N E"]) -> None:
        """Count some tokens: h normalised."""
        wide = torch.cat([h, h.new_ones(len(h), 1)], dim=1).double().cpu()
        self.second[layer] += wide.T @ wide
        self.cross[layer] += targets.double().cpu().T @ wide

    def solve(self, layer: int) -> tuple[Float[Tensor, "E R"], Float[Tensor, " E"]]:
        """W and b of one layer."""
        second = self.second[layer]
        ridge = _RIDGE * second.diagonal()[:-1].mean() * torch.eye(len(second), dtype=torch.float64)
        ridge[-1, -1] = 0.0
        both = torch.linalg.lstsq(second + ridge, self.cross[layer].T, driver="gelsd").solution.T.float()
        return both[:, :-1], both[:, -1]


_RIDGE = 1e-3
_SAMPLE = 2_000
"""Tokens of each layer that are kept to choose the scale by."""


def inputs_of(model: XLoraModel, batch: Batch) -> dict[str, Tensor]:
    """What the model is called with."""
    return {name: batch[name].to(device_of(model)) for name in ("input_ids", "attention_mask") if name in batch}


def real_tokens(batch: Batch) -> Bool[Tensor, "B S"]:
    """Which tokens are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def labelled_tokens(batch: Batch, experts: int) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Each token's expert, and which tokens have one and are no padding; on the CPU.

    Raises:
        ConfigurationError: a label that is no expert's.
    """
    ids = batch[EXPERT_IDS].cpu()
    check_expert_ids(ids, experts)
    ids = (ids if ids.dim() == 2 else ids.unsqueeze(1)).expand(batch["input_ids"].shape)
    return ids, (ids != IGNORED) & real_tokens(batch).cpu()


def forward_with(model: XLoraModel, make: Override, batch: Batch, *, whole: bool) -> Any:
    """A pass with the routing that `make()` returns, of the backbone or of the whole model; in evaluation mode."""
    with evaluating(model), override(state_of(model), make):
        called = model if whole else model.base_model
        return called(**inputs_of(model, batch), use_cache=False)


class LayerPass:
    """One pass in which a function makes the scalings of each layer, and what the layers saw.

    Args:
        model: the mixture.
        scalings: (*tokens, E) of a layer, from its number and its low-rank activation.
    """

    def __init__(self, model: XLoraModel, scalings: Callable[[int, Tensor], Tensor]) -> None:
        self._model, self._scalings, self._state = model, scalings, state_of(model)
        self._seen: dict[int, Tensor] = {}

    def run(self, batch: Batch, *, whole: bool = False) -> Any:
        """The forward of the backbone, or of the whole model; in evaluation mode."""
        self._seen = {}
        weight = self._state.config.global_scaling_weight
        return forward_with(self._model, lambda: LayerRouting(self._make, weight), batch, whole=whole)

    def _make(self, layer: int, low_rank: Tensor) -> Tensor:
        self._seen[layer] = low_rank.float()
        return self._scalings(layer, self._seen[layer])

    def activations(self, layer: int, tokens: torch.Size) -> Float[Tensor, "B S R"] | None:
        """What a layer saw, by text; None if it did not run, or saw other tokens."""
        seen = self._seen.get(layer)
        if seen is None:
            return None
        missing = seen.new_full((*tokens, 1, seen.shape[-1]), torch.nan)
        found = by_text(seen.unsqueeze(-2), tokens, missing, self._state.uses.orders.get(layer, TokenOrder()))
        return None if found is missing else found.squeeze(-2)


def uniform_scalings(model: XLoraModel) -> Callable[[int, Tensor], Tensor]:
    """1 / E for every token."""
    experts = len(model.expert_names)
    return lambda _layer, low_rank: low_rank.new_full((*low_rank.shape[:-1], experts), 1 / experts)


def fit_labels(model: XLoraModel, router: LinearRouter, batches: Iterable[Batch]) -> LayerStart:
    """Ridge regression of each layer's activation onto the experts of labelled text, in a uniform mixture.

    The scale of each layer is the one with which its softmax predicts the experts best; 1 where logits are the
    scalings.

    Raises:
        DataError: an expert without text, or a layer that sees no text.
        ConfigurationError: a label that is no expert's.
    """
    state, names = state_of(model), model.expert_names
    ranks = [layer.stack.rank for layer in layers_of(model.get_base_model()).values()]
    moments, passes = Moments(ranks, len(names)), LayerPass(model, uniform_scalings(model))
    samples = [Sample(_SAMPLE) for _ in ranks]
    for batch in batches:
        ids, known = labelled_tokens(batch, len(names))
        with torch.no_grad():
            passes.run(batch)
        for layer in range(len(ranks)):
            seen = passes.activations(layer, ids.shape)
            if seen is not None:
                h, e = normalised(seen).cpu()[known], ids[known]
                moments.add(layer, h, F.one_hot(e, len(names)).float())
                samples[layer].add(h, e)
    _check_text(names, moments)
    gating, accuracy = state.gating, list[float]()
    temperature = gating.temperature if gating.softmax else 1.0
    for layer in range(len(ranks)):
        weight, bias = moments.solve(layer)
        h, e = samples[layer].tokens()
        logits = h @ weight.T + bias
        scale = temperature * best_scale(logits, e) if gating.normalised else 1.0
        router.assign(layer, scale * weight, scale * bias)
        accuracy.append(float((logits.argmax(-1) == e).float().mean()))
    return LayerStart(tuple(accuracy))


def _check_text(names: Sequence[str], moments: Moments) -> None:
    for layer, cross in enumerate(moments.cross):
        empty = [name for name, count in zip(names, cross[:, -1].tolist(), strict=True) if not count]
        if empty:
            raise DataError(
                "Every expert needs some text to make a router from, and every layer sees it.",
                received=f"no token for {', '.join(map(repr, empty))} in layer {layer}",
                remedy="Give a few texts for each expert.",
            )


@torch.no_grad()
def calibrate(model: XLoraModel, router: NormRouter, batches: Sequence[Batch]) -> Calibration:
    """Set μ and σ to those over some text, in a uniform mixture; and compare with that mixture on the same text.

    Raises:
        DataError: fewer than two tokens at a layer.
    """
    passes = LayerPass(model, uniform_scalings(model))
    ranks = [layer.stack.rank for layer in layers_of(model.get_base_model()).values()]
    norms: list[list[Tensor]] = [[] for _ in ranks]
    uniform = Nats()
    for batch in batches:
        uniform.add(passes.run(batch, whole=True).logits, batch)
        for layer in range(len(ranks)):
            seen = passes.activations(layer, batch["input_ids"].shape)
            if seen is not None:
                norms[layer].append(router.log_norms(layer, seen)[real_tokens(batch).to(seen.device)])
    if any(sum(map(len, parts)) < _LEAST for parts in norms):
        raise DataError(
            f"A norm router is calibrated on at least {_LEAST} tokens, which every layer sees.",
            received=f"{sum(map(len, norms[0]))} tokens in {len(batches)} batches",
            remedy="Give more text; a few thousand tokens of all the kinds of text to come are plenty.",
        )
    every = [torch.cat(parts) for parts in norms]
    absent = router.offset != 0
    mean = torch.stack([each.mean(0) for each in every]).masked_fill(absent, 0.0)
    deviation = torch.stack([each.std(0) for each in every]).clamp_min(1e-6).masked_fill(absent, 1.0)
    router.assign(mean, deviation)
    own = Nats()
    with evaluating(model):
        for batch in batches:
            own.add(model(**inputs_of(model, batch), use_cache=False).logits, batch)
    found = Calibration(own.mean, uniform.mean)
    if found.loss >= found.uniform:
        warnings.warn(
            f"On the text that it was calibrated on, the norm router is no better than the uniform mixture "
            f'({found.loss:.4f} and {found.uniform:.4f} nats a token): use router="static", or text with labels.',
            stacklevel=4,
        )
    return found


_LEAST = 256


class Nats:
    """The mean loss of the real tokens."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, logits: Float[Tensor, "B S V"], batch: Batch) -> None:
        ids = batch["input_ids"].to(logits.device)
        real = real_tokens(batch).to(logits.device)[:, 1:]
        self.total += float(token_nats(logits, ids)[real].sum())
        self.count += int(real.sum())

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / max(1, self.count)
