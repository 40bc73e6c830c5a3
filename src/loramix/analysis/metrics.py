"""Numbers that say what a routing does; each takes scalings and gives one number, or one for each expert.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts.

    load_e        share of the (token, layer) pairs whose largest scaling is expert e's, among those that top-k left
    importance_e  mean scaling of expert e                       (Shazeer et al., arXiv 1701.06538, section 4)
    CV            standard deviation / mean over the experts; 0 when all are alike
    MaxVio        max_e load_e · E − 1; 0 when balanced          (arXiv 2408.15664, section 4)
    dead          share of experts whose load is below a hundredth of the even one, 1 / E
    entropy       of one token's scalings, and of the mean of all tokens' scalings, in shares of log E; their
                  difference, a mutual information, is 0 when the routing does not look at its input
    effective     exp of the entropy of the mean, which is a mean over layers: how many experts a layer uses
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_DEAD = 0.01


@dataclass(frozen=True)
class RoutingMetrics:
    """What a routing does, over all tokens and layers that were added.

    Attributes:
        load: by expert, adding up to 1; to less in a selection of experts that misses those which lead elsewhere.
        importance: by expert: mean scaling as it is.
        entropy_of_mean: of the mean over tokens, mean over layers, in shares of log E.
        mean_entropy: mean over tokens and layers, in shares of log E.
        tokens: N.
    """

    load: tuple[float, ...]
    importance: tuple[float, ...]
    entropy_of_mean: float
    mean_entropy: float
    tokens: int

    @property
    def load_cv(self) -> float:
        """Coefficient of variation of the load."""
        return _cv(self.load)

    @property
    def importance_cv(self) -> float:
        """Coefficient of variation of the importance."""
        return _cv(self.importance)

    @property
    def max_violation(self) -> float:
        """MaxVio."""
        return max(self.load) * len(self.load) - 1

    @property
    def dead_share(self) -> float:
        """The share of experts that are as good as never the largest."""
        return sum(share * len(self.load) < _DEAD for share in self.load) / len(self.load)

    @property
    def information(self) -> float:
        """Entropy of the mean less mean entropy: 0 when the routing does not depend on its input."""
        return max(self.entropy_of_mean - self.mean_entropy, 0.0)  # in this order nan stays nan

    @property
    def effective_experts(self) -> float:
        """How many experts a layer uses, from 1 to E."""
        return math.exp(self.entropy_of_mean * math.log(len(self.load)))

    def scalars(self) -> dict[str, float]:
        """The numbers that do not depend on the expert, by name."""
        return {
            "load_cv": self.load_cv,
            "importance_cv": self.importance_cv,
            "max_violation": self.max_violation,
            "dead_share": self.dead_share,
            "entropy_of_mean": self.entropy_of_mean,
            "mean_entropy": self.mean_entropy,
            "information": self.information,
            "effective_experts": self.effective_experts,
        }


class RoutingMeter:
    """Adds up what `RoutingMetrics` needs, batch by batch, without keeping the scalings."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._tokens = self._layers = 0
        self._sums: tuple[Tensor, ...] = ()

    def add(self, scalings: Float[Tensor, "B S L E"], real: Bool[Tensor, "B S"] | None = None) -> None:
        """Count the scalings of a forward.

        Args:
            scalings: detached or not; they may be negative, as logits in "hard" routing are: entropies are then those
                of their shares of the positive part.
            real: False at padding.
        """
        values = scalings.detach().float()
        values = values.flatten(0, 1) if real is None else values[real]
        if not values.numel():
            return
        shares = shares_of(values)
        leading = leads_of(values)
        entropy = torch.special.entr(shares).sum(-1).mean(-1).sum()
        added = (leading.sum((0, 1)), values.sum((0, 1)), shares.sum(0), entropy)
        self._sums = tuple(map(torch.add, self._sums, added)) if self._tokens else added
        self._tokens += len(values)
        self._layers = values.shape[1]

    def result(self) -> RoutingMetrics | None:
        """The metrics of what was added; None before anything was."""
        if not self._tokens:
            return None
        load, importance, mean, entropy = self._sums
        pairs = self._tokens * self._layers
        most = math.log(max(2, len(load)))
        of_mean = torch.special.entr(mean / self._tokens).sum(-1).mean() / most
        return RoutingMetrics(
            load=tuple((load / pairs).tolist()),
            importance=tuple((importance / pairs).tolist()),
            entropy_of_mean=float(of_mean),
            mean_entropy=float(entropy / self._tokens / most),
            tokens=self._tokens,
        )


def leading_of(scalings: Float[Tensor, "*N E"]) -> Int[Tensor, "*N"]:
    """argmax_e s_e among the experts that have a scaling: 0 is what top-k gives those that it did not select.

    -1 where none has, as in a selection of experts may be: nobody leads there.
    """
    leading = scalings.masked_fill(scalings == 0, -torch.inf).argmax(-1)
    return leading.where((scalings != 0).any(-1), -1)


def leaders_of(experts: Sequence[str], scalings: Float[Tensor, "N E"]) -> list[str | None]:
    """The name of each token's leading expert; None where nobody leads."""
    leading: list[int] = leading_of(scalings).tolist()
    return [None if leader < 0 else experts[leader] for leader in leading]


def leads_of(scalings: Float[Tensor, "*N E"]) -> Float[Tensor, "*N E"]:
    """1 at the leading expert, 0 elsewhere; nowhere 1 where no expert has a scaling."""
    return (leading_of(scalings).unsqueeze(-1) == torch.arange(scalings.shape[-1], device=scalings.device)).float()


def shares_of(scalings: Float[Tensor, "*N E"]) -> Float[Tensor, "*N E"]:
    """Each expert's share of the positive part of a token's scalings, in float32; all 0 where there is none."""
    positive = scalings.detach().float().clamp(min=0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def entropy_of(scalings: Float[Tensor, "*N E"]) -> Float[Tensor, "*N"]:
    """−Σ_e p_e log p_e / log E of the shares p: 0 where one expert has all, 1 where all have the same."""
    return torch.special.entr(shares_of(scalings)).sum(-1) / math.log(max(2, scalings.shape[-1]))


def confidence_of(scalings: Float[Tensor, "*N E"]) -> Float[Tensor, "*N"]:
    """(max_e p_e − 1/E) / (1 − 1/E) of the shares p: 0 where all experts have the same, 1 where one has all."""
    even = 1 / max(2, scalings.shape[-1])
    return ((shares_of(scalings).amax(-1) - even) / (1 - even)).clamp(min=0)


def _cv(values: tuple[float, ...]) -> float:
    mean = sum(values) / len(values)
    if mean == 0:
        return 0.0
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / abs(mean)
