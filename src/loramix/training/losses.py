"""Auxiliary losses of a router: pure functions, each with its equation and its source.

Each is a mean over the real tokens of a batch and over the layers, so that neither padding nor the number of layers
changes its size.

B, S: batch, sequence. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -1
"""The expert id of a token whose expert is unknown."""


def z_loss(logits: Float[Tensor, "B S L E"], real: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, ""]:
    """mean of (log Σ_e exp z_e)²: keeps logits small, where the softmax has gradients and float32 its precision.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return _mean(torch.logsumexp(logits, dim=-1).square(), real)


def load_balance(
    probabilities: Float[Tensor, "B S L E"],
    selected: Bool[Tensor, "B S L E"],
    real: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, ""]:
    """E / k · Σ_e f_e P_e: f_e the share of tokens that select expert e, P_e its mean probability; 1 when balanced.

    Rarely useful with experts of different domains: text of one domain should load one expert.

    Args:
        probabilities: of the experts, with gradients.
        selected: which experts each token uses, k of them.
        real: False at padding.

    Source: Switch Transformers, arXiv 2101.03961, equation 4; k > 1 as in Mixtral, arXiv 2401.04088.
    """
    load = _token_mean(selected.to(probabilities.dtype), real)
    k = load.sum(-1, keepdim=True).clamp(min=torch.finfo(load.dtype).tiny)
    return (probabilities.shape[-1] * (load / k * _token_mean(probabilities, real)).sum(-1)).mean()


def entropy_floor(
    probabilities: Float[Tensor, "B S L E"], floor: float, real: Bool[Tensor, "B S"] | None = None
) -> Float[Tensor, ""]:
    """max(0, floor − H(p̄) / log E), p̄ the mean probability over the batch: no expert is dropped altogether.

    A single token may still choose one expert with certainty: only the mean over the tokens is bounded.

    Args:
        probabilities: of the experts, with gradients.
        floor: a share of the largest entropy, from 0 to 1.
        real: False at padding.

    Source: the thresholded global entropy loss of LIMoE, arXiv 2206.02770.
    """
    mean = _token_mean(probabilities, real)
    entropy = torch.special.entr(mean).sum(-1) / math.log(max(2, probabilities.shape[-1]))
    return torch.relu(floor - entropy).mean()


def supervised(
    logits: Float[Tensor, "B S L E"], expert_ids: Int[Tensor, "*text"], real: Bool[Tensor, "B S"] | None = None
) -> Float[Tensor, ""]:
    """mean of −log softmax(z)[e]: cross-entropy with the expert that a text, or a token, belongs to; 0 if unknown.

    Args:
        logits: z.
        expert_ids: (B,) for whole texts, or (B, S); `IGNORED` where the expert is not known.
        real: False at padding.
    """
    ids = expert_ids if expert_ids.dim() == 2 else expert_ids.unsqueeze(1)
    ids = ids.expand(logits.shape[:2])
    known = ids != IGNORED
    index = ids.clamp(min=0)[:, :, None, None].expand(*logits.shape[:3], 1)
    nats = -torch.log_softmax(logits, dim=-1).gather(-1, index).squeeze(-1)
    return _mean(nats, known if real is None else known & real)


def _mean(values: Float[Tensor, "B S L"], real: Bool[Tensor, "B S"] | None) -> Float[Tensor, ""]:
    return _token_mean(values, real).mean()


def _token_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """The mean over B and S, at the real tokens; 0 where there are none."""
    if real is None:
        return values.mean((0, 1))
    weights = real.to(values.dtype).reshape(*real.shape, *[1] * (values.dim() - 2))
    # `where`, for a product would carry on what is not a number at padding
    return torch.where(weights > 0, values, 0.0).sum((0, 1)) / weights.sum().clamp(min=1)
