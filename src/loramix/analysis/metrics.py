"""Metrics of a routing: numbers over all tokens and layers, and quantities of single tokens.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts. s: final scalings. p: the share of each
expert in the positive part of a token's scalings; p̄ their mean over the tokens.

    load_e        share of the (token, layer) pairs whose largest scaling is expert e's, among those that top-k left
    importance_e  mean scaling of expert e                       (Shazeer et al., arXiv 1701.06538, section 4)
    H(p)          −Σ_e p_e log p_e / log E, the entropy in shares of its largest value

`METRICS` has the numbers that do not depend on the expert. To add one, write an entry there: records, JSON, terminal,
reports and training logs read the table. `RoutingMeter` accumulates the sums that they are computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_DEAD = 0.01
LEAST = 0.1
"""Of the mean importance of the experts: an expert with less is dead."""


@dataclass(frozen=True)
class RoutingMetrics:
    """The metrics of a routing, over all tokens and layers that were added.

    Attributes:
        load: load_e by expert. It sums to 1, or to less where a selection lacks experts that lead.
        importance: importance_e by expert.
        entropy_of_mean: H of the mean over the tokens, mean over the layers.
        mean_entropy: H of each token, mean over tokens and layers.
        tokens: N.
    """

    load: tuple[float, ...]
    importance: tuple[float, ...]
    entropy_of_mean: float
    mean_entropy: float
    tokens: int

    @property
    def load_cv(self) -> float:
        """The coefficient of variation of the load."""
        return _cv(self.load)

    @property
    def importance_cv(self) -> float:
        """The coefficient of variation of the importance."""
        return _cv(self.importance)

    @property
    def max_violation(self) -> float:
        """MaxVio: how far the largest load exceeds the even one, in shares of it."""
        return max(self.load) * len(self.load) - 1

    @property
    def dead_share(self) -> float:
        """The share of the experts that almost never lead."""
        return sum(share * len(self.load) < _DEAD for share in self.load) / len(self.load)

    @property
    def dead(self) -> tuple[int, ...]:
        """The experts with less than `LEAST` of the mean importance, in absolute values; they may lead at times."""
        sizes = [abs(value) for value in self.importance]
        least = LEAST * sum(sizes) / len(sizes)
        return tuple(expert for expert, size in enumerate(sizes) if size < least)

    @property
    def information(self) -> float:
        """The entropy of the mean minus the mean entropy: 0 when the routing does not depend on its input."""
        return max(self.entropy_of_mean - self.mean_entropy, 0.0)  # in this order nan stays nan

    @property
    def effective_experts(self) -> float:
        """The number of experts that a layer uses, from 1 to E."""
        return math.exp(self.entropy_of_mean * math.log(len(self.load)))

    def scalars(self) -> dict[str, float]:
        """The numbers of `METRICS` by name."""
        return {metric.name: metric.value(self) for metric in METRICS}

    def rows(self) -> list[tuple[str, str, str]]:
        """The numbers for a reader: title, value and meaning of each."""
        experts = len(self.load)
        return [
            (
                metric.title,
                metric.shown.format(value=metric.value(self), experts=experts),
                metric.meaning.format(most=experts - 1),
            )
            for metric in sorted(METRICS, key=lambda metric: metric.place)
        ]


@dataclass(frozen=True)
class Metric:
    """A number that does not depend on the expert.

    Attributes:
        name: in JSON and in training logs.
        title: for a reader.
        equation: how it is computed.
        value: computes it.
        shown: its format; `value` and `experts` (E) can be used.
        meaning: what values mean; `most` is E − 1.
        place: where it is listed for a reader; the end if nothing is said.
    """

    name: str
    title: str
    equation: str
    value: Callable[[RoutingMetrics], float]
    shown: str
    meaning: str
    place: int = 100


METRICS = (
    Metric(
        name="load_cv",
        title="CV of load",
        equation="standard deviation / mean of load_e over the experts",
        value=lambda found: found.load_cv,
        shown="{value:.2f}",
        meaning="0: each expert leads as often",
        place=6,
    ),
    Metric(
        name="importance_cv",
        title="CV of importance",
        equation="standard deviation / mean of importance_e over the experts",
        value=lambda found: found.importance_cv,
        shown="{value:.2f}",
        meaning="0: each expert gets as much",
        place=7,
    ),
    Metric(
        name="max_violation",
        title="MaxVio",
        equation="max_e load_e · E − 1 (arXiv 2408.15664, section 4)",
        value=lambda found: found.max_violation,
        shown="{value:.2f}",
        meaning="0: balanced; {most}: one expert leads everywhere",
        place=5,
    ),
    Metric(
        name="dead_share",
        title="dead experts",
        equation="share of the experts with load_e < 0.01 / E",
        value=lambda found: found.dead_share,
        shown="{value:.0%}",
        meaning="as good as never lead",
        place=8,
    ),
    Metric(
        name="entropy_of_mean",
        title="entropy of the mean",
        equation="mean over the layers of H(p̄)",
        value=lambda found: found.entropy_of_mean,
        shown="{value:.3f}",
        meaning="1: all experts alike over all tokens",
        place=4,
    ),
    Metric(
        name="mean_entropy",
        title="entropy of a token",
        equation="mean over tokens and layers of H(p)",
        value=lambda found: found.mean_entropy,
        shown="{value:.3f}",
        meaning="1: all experts alike in each token; 0: one has all",
        place=3,
    ),
    Metric(
        name="information",
        title="information",
        equation="entropy_of_mean − mean_entropy, the mutual information of token and expert in shares of log E",
        value=lambda found: found.information,
        shown="{value:.3f}",
        meaning="0: the routing does not depend on its input",
        place=2,
    ),
    Metric(
        name="effective_experts",
        title="effective experts",
        equation="exp(entropy_of_mean · log E)",
        value=lambda found: found.effective_experts,
        shown="{value:.2f} of {experts}",
        meaning="how many a layer uses, over all tokens",
        place=1,
    ),
)


class RoutingMeter:
    """Accumulates the sums for `RoutingMetrics`, batch by batch, without keeping the scalings."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start again."""
        self._tokens = self._layers = 0
        self._sums: tuple[Tensor, ...] = ()

    def add(self, scalings: Float[Tensor, "B S L E"], real: Bool[Tensor, "B S"] | None = None) -> None:
        """Add the scalings of a forward.

        Args:
            scalings: detached or not. They may be negative, as logits in "hard" routing are; entropies are then those
                of their positive part.
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
        """The metrics of all scalings that were added; None if there are none."""
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
    """argmax_e s_e among the experts with a scaling other than 0, which top-k gives to those that it does not select.

    -1 where no expert has one, as may be in a selection of experts.
    """
    leading = scalings.masked_fill(scalings == 0, -torch.inf).argmax(-1)
    return leading.where((scalings != 0).any(-1), -1)


def leaders_of(experts: Sequence[str], scalings: Float[Tensor, "N E"]) -> list[str | None]:
    """The name of each token's leading expert; None where none leads."""
    leading: list[int] = leading_of(scalings).tolist()
    return [None if leader < 0 else experts[leader] for leader in leading]


def leads_of(scalings: Float[Tensor, "*N E"]) -> Float[Tensor, "*N E"]:
    """1 at the leading expert, 0 elsewhere; all 0 where no expert leads."""
    return (leading_of(scalings).unsqueeze(-1) == torch.arange(scalings.shape[-1], device=scalings.device)).float()


def shares_of(scalings: Float[Tensor, "*N E"]) -> Float[Tensor, "*N E"]:
    """Each expert's share of the positive part of a token's scalings, in float32; all 0 where there is none."""
    positive = scalings.detach().float().clamp(min=0)
    return positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def entropy_of(scalings: Float[Tensor, "*N E"]) -> Float[Tensor, "*N"]:
    """H(p) = −Σ_e p_e log p_e / log E: 0 where one expert has all, 1 where all have the same."""
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
