"""How a router starts in closed form: from sums over tokens whose expert is known, one linear map

    z = scale · (W x + b)

of what the router reads, x: a hidden state, or a layer's low-rank activation.

N: tokens. F: features, the width of x; 0 for a router that reads nothing. E: experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loramix.routers.gating import Gating

ClosedForm = Literal["prompts", "labels"]
"""A linear discriminant of the experts' means, or ridge regression onto the experts."""

Method = Literal["zeros", "prompts", "text", "labels"]
"""The same, the labels given or found by the experts' likelihoods, or every expert alike."""


@dataclass(frozen=True)
class LinearRouter:
    """z = scale · (W x + b).

    Attributes:
        weight: W.
        bias: b.
        scale: the factor that sets how sharp the softmax of z is.
        accuracy: the share of the tokens it was made from whose expert has the largest logit; of many, of a sample.
    """

    weight: Float[Tensor, "E F"]
    bias: Float[Tensor, " E"]
    scale: float
    accuracy: float


class Sample:
    """Some of the labelled tokens, each as likely as any other whatever their order: those with the least random keys.

    Args:
        size: the most tokens.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(0)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._bound = 1.0

    def add(self, features: Float[Tensor, "N F"], experts: Int[Tensor, " N"]) -> None:
        """Offer tokens, each with the number of its expert."""
        keys = torch.rand(len(features), generator=self._generator)
        kept = keys < self._bound
        self._parts.append((keys[kept], features[kept], experts[kept]))
        if sum(len(keys) for keys, _, _ in self._parts) > 5 * self._size // 4:
            self._prune()

    def tokens(self) -> tuple[Float[Tensor, "N F"], Int[Tensor, " N"]]:
        """Those that are kept, and their experts."""
        self._prune()
        return self._parts[0][1:]

    def _prune(self) -> None:
        keys, features, experts = (torch.cat(part) for part in zip(*self._parts, strict=True))
        if len(keys) > self._size:
            keys, least = keys.topk(self._size, largest=False)
            features, experts, self._bound = features[least], experts[least], float(keys.max())
        self._parts = [(keys, features, experts)]


class Moments:
    """Sums over labelled tokens, in float64, from which a router is computed in closed form.

    Args:
        features: F.
        experts: E.
    """

    def __init__(self, features: int, experts: int) -> None:
        self.second = torch.zeros(features + 1, features + 1, dtype=torch.float64)  # Σ x xᵀ, x with a 1 behind it
        self.cross = torch.zeros(experts, features + 1, dtype=torch.float64)  # Σ over each expert's tokens of x
        self._sample = Sample(_SAMPLE)

    def add(self, features: Float[Tensor, "N F"], experts: Int[Tensor, " N"]) -> None:
        """Add tokens, each with the number of its expert."""
        wide = torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()
        self.second += wide.T @ wide
        chosen = torch.zeros(len(self.cross), len(features), dtype=torch.float64)
        self.cross += chosen.scatter(0, experts.unsqueeze(0), 1.0) @ wide
        self._sample.add(features, experts)

    @property
    def counts(self) -> Float[Tensor, " E"]:
        """The number of tokens of each expert."""
        return self.cross[:, -1]

    def fit(self, method: ClosedForm, gating: Gating) -> LinearRouter:
        """The linear map, with the scale that fits the gating: 1 where logits are the scalings themselves."""
        weight, bias = self._discriminant() if method == "prompts" else self._regression()
        weight, bias = weight.float(), bias.float()
        features, experts = self._sample.tokens()
        logits = features @ weight.T + bias
        accuracy = float((logits.argmax(-1) == experts).float().mean())
        temperature = gating.temperature if gating.softmax else 1.0
        scale = temperature * best_scale(logits, experts) if gating.normalised else 1.0
        return LinearRouter(weight, bias, scale, accuracy)

    def fit_logistic(self, gating: Gating) -> LinearRouter:
        """The linear map whose softmax predicts the experts best, each expert's tokens weighted as one.

            minimise  Σ_n c_n · cross-entropy(W x_n + b, e_n) + λ ‖W‖² σ² / F,  with σ the deviation of x

        Source: multinomial logistic regression with a ridge penalty (le Cessie and van Houwelingen, 1992).
        """
        features, experts = self._sample.tokens()
        mean, deviation = features.mean(0), features.std().clamp_min(1e-12)
        inputs = (features - mean) / deviation
        weights = 1 / torch.bincount(experts, minlength=len(self.cross)).clamp_min(1)
        both = torch.zeros(len(self.cross), features.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([both], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = inputs @ both[:, :-1].T + both[:, -1]
            found = nn.functional.cross_entropy(logits, experts, weight=weights)
            found = found + _PENALTY * both[:, :-1].square().sum() / features.shape[1]
            found.backward()
            return found

        with torch.enable_grad():
            optimizer.step(loss)
        weight = both.detach()[:, :-1] / deviation
        bias = both.detach()[:, -1] - weight @ mean
        accuracy = float(((features @ weight.T + bias).argmax(-1) == experts).float().mean())
        return LinearRouter(weight, bias, gating.temperature if gating.softmax else 1.0, accuracy)

    def _discriminant(self) -> tuple[Tensor, Tensor]:
        """w_e = Σ⁻¹ μ_e, b_e = −½ μ_eᵀ Σ⁻¹ μ_e, with Σ the covariance within the experts' texts, shrunk.

        Source: Fisher's linear discriminant with equal priors; shrinkage as in Ledoit and Wolf (2004), fixed.
        """
        counts, means = self.counts, self.cross[:, :-1] / self.counts.unsqueeze(1)
        total = counts.sum()
        within = self.second[:-1, :-1] / total - (means.T * (counts / total)) @ means
        size = len(within)
        target = torch.eye(size, dtype=torch.float64) * within.diagonal().mean()
        shrunk = (1 - _SHRINKAGE) * within + _SHRINKAGE * target
        weight = torch.linalg.solve(shrunk, means.T).T
        return weight, -0.5 * (weight * means).sum(1)

    def _regression(self) -> tuple[Tensor, Tensor]:
        """[W b] = Y Xᵀ (X Xᵀ + λ I)⁻¹, Y one-hot: ridge regression onto the experts."""
        size = len(self.second)
        ridge = _RIDGE * self.second.diagonal()[:-1].mean() * torch.eye(size, dtype=torch.float64)
        ridge[-1, -1] = 0.0
        both = torch.linalg.solve(self.second + ridge, self.cross.T).T
        return both[:, :-1], both[:, -1]


_SAMPLE = 20_000
"""Tokens that are kept to choose the scale by."""
_SHRINKAGE = 0.1
_RIDGE = 1e-3
_PENALTY, _STEPS = 0.1, 100
_SMOOTHING = 0.1  # without it the router could saturate, and would have no gradient


def best_scale(logits: Float[Tensor, "N E"], experts: Int[Tensor, " N"]) -> float:
    """The factor that minimises the cross-entropy, by golden section over its logarithm; there is one minimum."""

    def nats(log_scale: float) -> float:
        scaled = math.exp(log_scale) * logits
        return float(nn.functional.cross_entropy(scaled, experts, label_smoothing=_SMOOTHING))

    low, high, ratio = math.log(1e-3), math.log(1e3), (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if nats(left) < nats(right) else (left, high)
    return math.exp((low + high) / 2)
