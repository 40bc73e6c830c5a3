"""Held-out text that the training text contains: found by runs of bytes that both have.

N: positions of a text.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from loramix.training.data import Row

RUN = 64
"""Bytes of a run, about as many as 13 words have; white space counts as one space."""


@dataclass(frozen=True)
class Overlap:
    """What training text contains of held-out text.

    Attributes:
        share: of the held-out text, in runs.
        rows: held-out rows at least half of which is contained, each with a row of the training text that has some.
    """

    share: float
    rows: list[tuple[Row, Row]]


def overlap(held_out: Sequence[Row], training: Sequence[Row]) -> Overlap:
    """Look for each run of the held-out texts, one after the other, at every place of the training texts.

    A text that is shorter than a run is contained where a training text is the same.
    """
    texts = [_text(row) for row in held_out]
    runs = [_hashes(text)[::RUN] for text in texts]
    wanted = torch.cat(runs).unique() if runs else torch.empty(0, dtype=torch.int64)
    where, same = dict[int, Row](), dict[bytes, Row]()
    for row, text in zip(training, map(_text, training), strict=True):
        if len(text) < RUN:
            same.setdefault(text, row)
        hashes = _hashes(text)
        for run in hashes[_among(hashes, wanted)].tolist():
            where.setdefault(run, row)
    count, found, rows = 0, 0, list[tuple[Row, Row]]()
    for row, text, run in zip(held_out, texts, runs, strict=True):
        owners = [where.get(each) for each in run.tolist()] if len(run) else [same.get(text)]
        contained = [owner for owner in owners if owner is not None]
        count, found = count + len(owners), found + len(contained)
        if contained and 2 * len(contained) >= len(owners):
            rows.append((row, contained[0]))
    return Overlap(found / max(1, count), rows)


def warn_of_overlap(held_out: Sequence[Row], training: Sequence[Row]) -> None:
    """Warn where held-out rows are contained in the training text."""
    found = overlap(held_out, training)
    if found.rows:
        one, other = found.rows[0]
        warnings.warn(
            "Text to evaluate with is held out from the training.\n"
            f"  received: {len(found.rows)} of {len(held_out)} rows, {found.share:.0%} of the text, that the training "
            f"text contains; {one.source} is in {other.source}\n"
            "  remedy: leave these rows out of data.train or data.eval; as it is, figures are of text that was seen",
            stacklevel=3,
        )


def _text(row: Row) -> bytes:
    return b" ".join(word for part in _strings(row.content) for word in part.encode().split())


def _strings(content: object) -> Iterator[str]:
    """The texts of a row; of a conversation, what was said."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        fields = cast("Mapping[str, Any]", content)
        for name, value in fields.items():
            if name != "role":
                yield from _strings(value)
    elif isinstance(content, Iterable):
        for value in cast("Iterable[object]", content):
            yield from _strings(value)


def _hashes(text: bytes) -> Int[Tensor, " N"]:
    """Of the run at each position: Σ_k byte_k · factor^k modulo 2^64, from one sum over the text."""
    if len(text) < RUN:
        return torch.empty(0, dtype=torch.int64)
    values = torch.tensor(bytearray(text), dtype=torch.uint8).to(torch.int64) + 1
    powers = torch.full_like(values, _FACTOR).cumprod(0)
    sums = torch.cat([values.new_zeros(1), (values * powers).cumsum(0)])
    inverses = torch.full_like(values, _INVERSE).cumprod(0)
    return (sums[RUN:] - sums[:-RUN]) * inverses[: len(values) - RUN + 1]


def _among(values: Int[Tensor, " N"], wanted: Int[Tensor, " M"]) -> Tensor:
    """Which values are among those that are wanted, which are sorted."""
    if not len(wanted):
        return torch.zeros_like(values, dtype=torch.bool)
    return wanted[torch.searchsorted(wanted, values).clamp_max(len(wanted) - 1)] == values


_FACTOR = 6364136223846793005
_INVERSE = pow(_FACTOR, -1, 2**64) - (2**64 if pow(_FACTOR, -1, 2**64) >= 2**63 else 0)
