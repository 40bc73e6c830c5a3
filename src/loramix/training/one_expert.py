"""The column of one expert in a classifier, from a few texts; the other experts' columns stay as they are.

    P(e | h) = σ((w · f(h) + b) / T − log Σ_others exp(z / T))

f(h) is what the classifier's last layer reads, z the other experts' logits (none's too, with that gating), T the
temperature. w and b minimise the cross-entropy of P, 1 on the expert's own texts and 0 on those of the others, with a
small square penalty on w. The problem is convex: one minimum, whatever the start.

H: hidden size. E: experts. N: tokens. D: L with layerwise scalings, else 1. F: width of the last layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.model.build import XLoraModel
from loramix.passes.state import evaluating, state_of
from loramix.routers.classifier import XLoraClassifier
from loramix.routers.none import NoneGating
from loramix.training.initialise import hidden_states, prompt_texts


@dataclass(frozen=True)
class ExpertFit:
    """What the router gives the expert after the fit, before top-k, on the texts of the fit.

    Attributes:
        own: the mean of P on the expert's own texts.
        others: on those of the others.
    """

    own: float
    others: float


def fit_expert(
    model: XLoraModel, name: str, *, tokenizer: Any, prompts: Mapping[str, str | Path | Sequence[str]]
) -> ExpertFit:
    """Give an expert, such as one that was just added, its column of the router; no other expert's logit changes.

    Args:
        model: the mixture.
        name: the expert.
        tokenizer: a transformers tokenizer.
        prompts: as for `init_router`: texts of every expert, each expert counting as much as any other.

    Raises:
        UnsupportedOperationError: a router that is not a classifier with biases, or an encoder–decoder.
        ConfigurationError: no such expert, a single one, or a gating without a softmax.
        DataError: an expert without text, a name that is no expert's, or a file that cannot be read.
    """
    state, router, names = state_of(model), model.router, model.expert_names
    if not isinstance(router, XLoraClassifier) or not router.config.use_bias or state.has_encoder:
        raise UnsupportedOperationError(
            "An expert's column is fitted in a classifier with biases, where one backbone reads a text.",
            received=f"router={router.kind!r} of a {type(model).__name__}",
            remedy="train the router",
        )
    gating = state.gating
    if name not in names or len(names) == 1 or not gating.normalised:
        raise ConfigurationError(
            "One of several experts is fitted to its share of a softmax.",
            received=f"{name!r} of {', '.join(map(repr, names))}, {gating}",
            remedy="name an expert of the mixture, and set enable_softmax or enable_softmax_topk",
        )
    place, texts = names.index(name), prompt_texts(prompts, names)
    tokens = {expert: torch.cat([_hidden(model, tokenizer, text) for text in texts[expert]]) for expert in names}
    hidden = torch.cat(list(tokens.values()))
    parts, device = list(tokens.items()), hidden.device
    own = torch.cat([torch.full((len(each),), expert == name, device=device) for expert, each in parts])
    weight = torch.cat([torch.full((len(each),), 1 / (len(names) * len(each)), device=device) for _, each in parts])
    temperature = gating.temperature if gating.softmax else 1.0
    with torch.no_grad(), evaluating(router):
        features = router.layers[:-1](hidden)
        others = torch.arange(len(names), device=device) != place
        rivals = router.distinct(hidden[None])[0][..., others]
        if isinstance(gating, NoneGating):
            rivals = F.pad(rivals, (0, 1), value=gating.none_logit)
    offset = -(rivals / temperature).logsumexp(-1)
    w, b = _logistic(features, offset, own, weight)
    last = cast(nn.Linear, router.layers[-1])
    with torch.no_grad():
        last.weight.unflatten(0, (-1, len(names)))[:, place] = (temperature * w).to(last.weight)
        last.bias.unflatten(0, (-1, len(names)))[:, place] = (temperature * b).to(last.bias)
    shares = torch.sigmoid(features @ w.T + b + offset)
    return ExpertFit(float(shares[own].mean()), float(shares[~own].mean()))


def _hidden(model: XLoraModel, tokenizer: Any, text: str) -> Float[Tensor, "N H"]:
    ids = tokenizer(text, return_tensors="pt", truncation=tokenizer.model_max_length < _NO_LIMIT)["input_ids"]
    return hidden_states(model, {"input_ids": ids})[0].float()


def _logistic(
    features: Float[Tensor, "N F"], offset: Float[Tensor, "N D"], own: Bool[Tensor, " N"], weight: Float[Tensor, " N"]
) -> tuple[Float[Tensor, "D F"], Float[Tensor, " D"]]:
    """Logistic regression with an offset: the w and b whose σ(w · f + b + offset) predicts `own` best.

    Targets are smoothed, so that the router does not saturate, and weighed by `weight`. Features are scaled to unit
    deviation; the penalty is on what multiplies the scaled ones.
    """
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    scaled = ((features - mean) / deviation).detach()
    target = own.float().lerp(torch.full_like(weight, 0.5), _SMOOTHING).unsqueeze(1).expand_as(offset)
    w = features.new_zeros(offset.shape[1], features.shape[1], requires_grad=True)
    b = features.new_zeros(offset.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        nats = F.binary_cross_entropy_with_logits(scaled @ w.T + b + offset, target, reduction="none")
        loss = (weight.unsqueeze(1) * nats).sum() + _PENALTY * w.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    w, b = w.detach(), b.detach()
    w = w / deviation
    return w, b - w @ mean


_SMOOTHING = 0.1
_PENALTY = 1e-3
_NO_LIMIT = 10**9
"""Tokenizers without a limit have a `model_max_length` far above this."""
