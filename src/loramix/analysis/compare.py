"""Comparisons: layers with each other, one record with another, and a record with labels of its tokens.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loramix.analysis.metrics import leads_of, shares_of
from loramix.analysis.record.part import Part
from loramix.analysis.record.record import RoutingRecord
from loramix.errors import RoutingError
from loramix.experts.selection import as_python, listed


def agreement(record: RoutingRecord) -> Float[Tensor, "L L"]:
    """For each pair of layers, the share of the tokens that the same expert leads in both.

        agreement[l, m] = (1 / N) Σ_t [argmax_e s_tle = argmax_e s_tme]

    Symmetric, and 1 on the diagonal.

    Raises:
        RoutingError: nothing was recorded, scalings that are not finite, or layers that share one routing.
    """
    if record.shared:
        raise RoutingError(
            "Layers agree more or less where each has its own scalings.",
            received=f"one routing that all {len(record.header.adapted)} layers share: they always agree",
            remedy="build the mixture with layerwise_scalings=True to let layers differ",
        )
    layers = len(record.layers)
    same, count = torch.zeros(layers, layers, dtype=torch.float64), 0
    for part in record.measurable():
        leading = leads_of(part.scalings).double()
        none = 1 - leading.sum(-1)  # two layers in which no expert leads agree too
        same += torch.einsum("nle,nme->lm", leading, leading) + none.T @ none
        count += len(part)
    return (same / count).float()


@dataclass(frozen=True)
class Drift:
    """How much the routing of the same tokens differs between two records.

    Attributes:
        importance: by expert, the mean scaling in the second record minus that in the first.
        divergence: of each token, the mean over the layers: from 0 (the same shares) to 1 (no expert in common).
        by_layer: by layer, the mean over the tokens.
    """

    importance: dict[str, float]
    divergence: Float[Tensor, " N"]
    by_layer: dict[str, float]

    @property
    def mean_divergence(self) -> float:
        """The mean over all tokens."""
        return float(self.divergence.mean())


def drift(one: RoutingRecord, other: RoutingRecord) -> Drift:
    """The drift between two records of the same tokens and experts, such as before and after a training.

        JSD(p, q) = [H((p + q) / 2) − (H(p) + H(q)) / 2] / log 2      (Lin 1991, doi 10.1109/18.61115)

    with H the entropy, p and q the shares of a token's scalings.

    Args:
        one: the first record.
        other: the second record; its experts and layers may be in another order.

    Raises:
        RoutingError: nothing was recorded, or the experts, layers or tokens differ.
    """
    other = in_order_of(one, other)
    for what in ("experts", "layers"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if mine != theirs:
            raise RoutingError(
                "Drift is measured between records of the same experts and layers.",
                received=f"{what} {listed(mine)} and {listed(theirs)}",
                remedy="record both with the same mixture, or with two trainings of it",
            )
    first, second = same_tokens(one, other)
    p, q = shares_of(first.scalings), shares_of(second.scalings)
    entropy = [torch.special.entr(shares).sum(-1) for shares in ((p + q) / 2, p, q)]
    divergence = ((entropy[0] - (entropy[1] + entropy[2]) / 2) / math.log(2)).clamp(0, 1)
    change = (second.scalings - first.scalings).mean((0, 1)).tolist()
    return Drift(
        dict(zip(one.experts, change, strict=True)),
        divergence.mean(1),
        dict(zip(one.layers, divergence.mean(0).tolist(), strict=True)),
    )


def in_order_of(one: RoutingRecord, other: RoutingRecord) -> RoutingRecord:
    """`other` with its experts and layers in the order of `one`; unchanged where they are not the same."""
    if other.experts != one.experts and sorted(other.experts) == sorted(one.experts):
        other = other.select(experts=_places(other.experts, one.experts))
    if other.layers != one.layers and sorted(other.layers) == sorted(one.layers):
        other = other.select(layers=_places(other.layers, one.layers))
    return other


def _places(names: list[str], wanted: list[str]) -> list[int]:
    return [names.index(name) for name in wanted]


def same_tokens(one: RoutingRecord, other: RoutingRecord) -> tuple[Part, Part]:
    """The tokens of both records, in the same order.

    Raises:
        RoutingError: nothing was recorded, or the tokens differ.
    """
    first, second = one.measurable_part, other.measurable_part
    if len(first) != len(second) or not torch.equal(first.token, second.token) or not _side_by_side(first, second):
        raise RoutingError(
            "Two records are compared token by token: both hold the same tokens of the same texts.",
            received=f"{len(first)} and {len(second)} tokens that are not the same"
            + (", at least one of them a sample" if one.is_sample or other.is_sample else ""),
            remedy="run both mixtures over the same text, in the same order and batches, and record all of it",
        )
    return first, second


def _side_by_side(first: Part, second: Part) -> bool:
    """Whether positions and beginnings of texts are the same; the numbers of the texts may differ."""
    begins = (first.sequence.diff() != 0, second.sequence.diff() != 0)
    return torch.equal(first.position, second.position) and torch.equal(*begins)


@dataclass(frozen=True)
class Confusion:
    """How many tokens of each label each expert leads.

    Attributes:
        labels: the labels, sorted, numbers first.
        experts: the experts, in their order.
        counts: the number of tokens by label and leading expert.
        tokens: the number of tokens of each label; in a selection of experts some of them may have no leading expert.
    """

    labels: list[str]
    experts: list[str]
    counts: Int[Tensor, "labels E"]
    tokens: Int[Tensor, " labels"]

    @property
    def shares(self) -> Float[Tensor, "labels E"]:
        """The share of the tokens of each label that each expert leads."""
        return self.counts / self.tokens[:, None]

    @property
    def accuracy(self) -> float | None:
        """The share of the tokens labelled with an expert's name that this expert leads; None without such tokens."""
        named = [i for i, label in enumerate(self.labels) if label in self.experts]
        right = sum(int(self.counts[i, self.experts.index(self.labels[i])]) for i in named)
        return right / int(self.tokens[named].sum()) if named else None


def confusion(record: RoutingRecord, labels: Iterable[Any] | Mapping[int, Any]) -> Confusion:
    """How often each expert leads the tokens of each label.

        counts[c, e] = Σ_t [label_t = c] · [argmax_e′ mean_l s_tle′ = e]

    Args:
        record: the record.
        labels: one for each recorded token, in the record's order, as a list, a tensor or a column of a table; or a
            mapping from the number of a text to its label. Tokens labelled None, nan or NA do not count.

    Raises:
        RoutingError: nothing was recorded, or labels that do not fit the record.
    """
    whole = record.measurable_part
    if isinstance(labels, Mapping):
        of_texts = cast("Mapping[int, Any]", labels)
        found: Any = [of_texts.get(number) for number in whole.sequence.tolist()]
    else:
        found = as_python(labels)
    several = [] if isinstance(found, str) or not isinstance(found, Iterable) else list(cast("Iterable[Any]", found))
    column = [_label(value) for value in several]
    fits = len(column) == len(whole)
    if not fits or all(label is None for label in column):
        raise RoutingError(
            "There is one label for each recorded token, or for each text by its number.",
            received="no label at all" if fits else f"{len(column)} labels for {len(whole)} tokens",
            remedy="pass a label, or None, for each token of record.tokens, or {number: label} for record.sequences",
        )
    names = sorted({label for label in column if label is not None}, key=_by_number)
    row_of = {name: row for row, name in enumerate(names)}
    rows = torch.tensor([-1 if label is None else row_of[label] for label in column])
    labelled = torch.nn.functional.one_hot(rows + 1, len(names) + 1)[:, 1:].double()
    counts = (labelled.T @ leads_of(whole.scalings.mean(1)).double()).long()
    return Confusion(names, record.experts, counts, labelled.sum(0).long())


def _label(value: Any) -> str | None:
    """A label as text; None where it is unknown."""
    value = as_python(value)
    try:
        known = value is not None and bool(value == value)  # nan is not itself
    except TypeError:  # NA is neither
        return None
    return str(value) if known else None


def _by_number(label: str) -> tuple[bool, float, str]:
    """A sort key: numbers by value, before words."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label
