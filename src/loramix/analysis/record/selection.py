"""Selecting tokens of a record by position, by text or by a mask.

N: tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from loramix.analysis.record.part import Part
from loramix.errors import RoutingError
from loramix.experts.selection import PlainSelection, Selection, as_python, is_mask, plain_selection

TokenSelection = Selection | Tensor


def row_of_ids(ids: Any) -> list[int]:
    """The token ids of one text, which may be the only row of a batch.

    Raises:
        RoutingError: anything else.
    """
    rows = as_python(ids)
    alone = isinstance(rows, list) and len(cast("list[Any]", rows)) == 1 and isinstance(rows[0], list)
    row = plain_selection(rows[0] if alone else rows, names=False)
    if not isinstance(row, list):
        raise RoutingError("A text is found by a row of token ids.", received=f"{ids!r}"[:200], remedy="pass ids[0]")
    return cast("list[int]", row)


def token_mask(
    part: Part,
    tokens: PlainSelection | None,
    sequences: int | slice | Sequence[int] | None,
    texts: Sequence[str] | None,
) -> Bool[Tensor, " N"]:
    """True at the selected tokens.

    Args:
        part: all tokens.
        tokens: positions, patterns of the tokens' text, or the mask itself.
        sequences: numbers of texts, or a slice of them.
        texts: the text of each token, where `tokens` may hold a pattern.

    Raises:
        RoutingError: negative numbers, for texts end at different positions; a mask of another length.
    """
    chosen = torch.ones(len(part), dtype=torch.bool)
    if isinstance(sequences, slice):
        chosen &= _in_slice(part.sequence, sequences, "sequences")
    elif sequences is not None:
        numbers = [sequences] if isinstance(sequences, int) else list(sequences)
        chosen &= torch.isin(part.sequence, torch.tensor(numbers, dtype=torch.long))
    if tokens is None:
        return chosen
    if is_mask(tokens):
        mask = torch.tensor(tokens)
        if mask.shape != chosen.shape:
            raise RoutingError(
                "A mask has one value for each recorded token.",
                received=f"{len(mask)} values for {len(part)} tokens",
                remedy="make it from the record's own tensors, such as record.tokens == 13",
            )
        return chosen & mask
    if isinstance(tokens, slice):
        return chosen & _in_slice(part.position, tokens, "tokens")
    several = [tokens] if isinstance(tokens, int | str) else list(tokens)
    positions = [one for one in several if not isinstance(one, str)]
    _refuse_negative(positions, f"tokens={tokens!r}")
    found = torch.isin(part.position, torch.tensor(positions, dtype=torch.long))
    patterns = [one for one in several if isinstance(one, str)]
    if patterns:
        matches = [any(text == one or fnmatchcase(text, one) for one in patterns) for text in texts or ()]
        found |= torch.tensor(matches, dtype=torch.bool)
    return chosen & found


def _in_slice(numbers: Tensor, wanted: slice, what: str) -> Tensor:
    ends: list[int | None] = [wanted.start, wanted.stop, wanted.step]
    _refuse_negative([end for end in ends if end is not None], f"{what}={wanted!r}")
    first, step = wanted.start or 0, wanted.step or 1
    inside = (numbers >= first) & ((numbers - first) % step == 0)
    return inside if wanted.stop is None else inside & (numbers < wanted.stop)


def _refuse_negative(numbers: Sequence[int], received: str) -> None:
    if any(number < 0 for number in numbers):
        raise RoutingError(
            "Positions count from the beginning of a text: texts end at different ones.",
            received=received,
            remedy="pass positions from 0, or a mask of the record's tokens, such as record.positions > 100",
        )
