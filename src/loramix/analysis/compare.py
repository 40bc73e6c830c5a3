"""Layers with each other, one record with another, and a record with what is known of its text.

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
    """For each two layers, the share of tokens that the same expert leads in both.

        agreement[l, m] = (1 / N) Σ_t [argmax_e s_tle = argmax_e s_tme]

    Symmetric, and 1 on the diagonal.

    Raises:
        RoutingError: nothing was recorded, scalings that are no numbers, or all layers share them.
    """
    if record.shared:
        raise RoutingError(
            "Layers agree more or less where each has its own scalings.",
            received=f"one routing that all {len(record.header.adapted)} layers share: they agree always",
            remedy="build the mixture with layerwise_scalings=True to let layers differ",
        )
    layers = len(record.layers)
    same, count = torch.zeros(layers, layers, dtype=torch.float64), 0
    for part in record.measurable():
        leading = leads_of(part.scalings).double()
        nobody = 1 - leading.sum(-1)  # which is alike too
        same += torch.einsum("nle,nme->lm", leading, leading) + nobody.T @ nobody
        count += len(part)
    return (same / count).float()


@dataclass(frozen=True)
class Drift:
    """How far the routing of the same tokens is from one record to another.

    Attributes:
        importance: by expert, the mean scaling in the other record less that in the one.
        divergence: (N,) of each token, mean over the layers, from 0 (the same shares) to 1 (no expert in common).
        by_layer: its mean over the tokens, by layer.
    """

    importance: dict[str, float]
    divergence: Float[Tensor, " N"]
    by_layer: dict[str, float]

    @property
    def mean_divergence(self) -> float:
        """Of all tokens."""
        return float(self.divergence.mean())


def drift(one: RoutingRecord, other: RoutingRecord) -> Drift:
    """From one record to another of the same tokens and experts, such as before a training and after it.

        JSD(p, q) = [H((p + q) / 2) − (H(p) + H(q)) / 2] / log 2      (Lin 1991, doi 10.1109/18.61115)

    with H the entropy, p and q the shares of a token's scalings.

    Args:
        one: the record before.
        other: the record after; its experts and layers may be in another order.

    Raises:
        RoutingError: nothing was recorded; other experts, layers or tokens.
    """
    other = in_order_of(one, other)
    for what in ("experts", "layers"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if mine != theirs:
            raise RoutingError(
                "A routing drifts between records of the same experts and layers.",
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
    """`other` with experts and layers in the order of `one`, where they are the same; else as it is."""
    if other.experts != one.experts and sorted(other.experts) == sorted(one.experts):
        other = other.select(experts=_places(other.experts, one.experts))
    if other.layers != one.layers and sorted(other.layers) == sorted(one.layers):
        other = other.select(layers=_places(other.layers, one.layers))
    return other


def _places(names: list[str], wanted: list[str]) -> list[int]:
    return [names.index(name) for name in wanted]


def same_tokens(one: RoutingRecord, other: RoutingRecord) -> tuple[Part, Part]:
    """All of both, token by token beside each other.

    Raises:
        RoutingError: nothing was recorded, or other tokens.
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
    """Whether positions are the same, and texts begin at the same tokens, whatever their numbers are."""
    begins = (first.sequence.diff() != 0, second.sequence.diff() != 0)
    return torch.equal(first.position, second.position) and torch.equal(*begins)


@dataclass(frozen=True)
class Confusion:
    """Which expert leads tokens of which label.

    Attributes:
        labels: the labels, numbers first, in order.
        experts: the experts, in order.
        counts: tokens that each expert leads, by label and expert.
        tokens: all tokens of each label: more where a selection of experts leaves some that nobody leads.
    """

    labels: list[str]
    experts: list[str]
    counts: Int[Tensor, "labels E"]
    tokens: Int[Tensor, " labels"]

    @property
    def shares(self) -> Float[Tensor, "labels E"]:
        """Of the tokens of each label, the share that each expert leads."""
        return self.counts / self.tokens[:, None]

    @property
    def accuracy(self) -> float | None:
        """Of the tokens whose label is an expert's name, the share that this one leads; None where there are none."""
        named = [i for i, label in enumerate(self.labels) if label in self.experts]
        right = sum(int(self.counts[i, self.experts.index(self.labels[i])]) for i in named)
        return right / int(self.tokens[named].sum()) if named else None


def confusion(record: RoutingRecord, labels: Iterable[Any] | Mapping[int, Any]) -> Confusion:
    """How often each expert leads the tokens of each label.

        counts[c, e] = Σ_t [label_t = c] · [argmax_e′ mean_l s_tle′ = e]

    Args:
        record: the record.
        labels: one for each recorded token, in the record's order, as a list, a tensor or a column of a table; or by
            the number of the text. None leaves out, and so do nan and NA, which tables hold where nothing is known.

    Raises:
        RoutingError: nothing was recorded, or labels that do not fit it.
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
    """A label's text; None where none is known."""
    value = as_python(value)
    try:
        known = value is not None and bool(value == value)  # nan is not itself
    except TypeError:  # NA is neither
        return None
    return str(value) if known else None


def _by_number(label: str) -> tuple[bool, float, str]:
    """To sort numbers as numbers, and before words."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label
