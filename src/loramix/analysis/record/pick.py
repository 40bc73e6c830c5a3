"""Picking some of a record by number, name or pattern.

N: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, SupportsIndex, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from loramix.analysis.record.parts import Part
from loramix.errors import RoutingError

Picked = SupportsIndex | str | slice | Iterable[SupportsIndex | str]
Tokens = Picked | Tensor
Plain = int | str | slice | Sequence[int | str]
"""The same, in Python's own numbers and lists."""


def own(value: Any) -> Any:
    """What a tensor, an array or a column of a table holds, in Python's own numbers and lists; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def plain(wanted: Any, *, names: bool = True, mask: bool = False) -> Any:
    """What was asked for in Python's own numbers, slices and lists: not in those of tensors, arrays or tables.

    Args:
        wanted: what a caller passed; None stays None.
        names: whether it may be names or patterns.
        mask: whether it may be a list of True and False.

    Raises:
        RoutingError: it is something else.
    """
    if wanted is None or (names and isinstance(wanted, str)):
        return wanted
    if isinstance(wanted, slice):
        ends = [None if end is None else _number(end, wanted) for end in (wanted.start, wanted.stop, wanted.step)]
        if ends[2] == 0:
            raise _not_picked(wanted)
        return slice(*ends)
    found = own(wanted)
    if isinstance(found, str) or not isinstance(found, Iterable):
        return _number(found, wanted)
    several = [one.item() if hasattr(one, "item") else one for one in cast("Iterable[Any]", found)]
    if mask and is_mask(several):
        return several
    return [one if names and isinstance(one, str) else _number(one, wanted) for one in several]


def _number(value: Any, wanted: Any) -> int:
    """A whole number that a token's tensors can hold."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or abs(value.__index__()) >= 2**62:
        raise _not_picked(wanted)
    return value.__index__()


def _not_picked(wanted: Any) -> RoutingError:
    return RoutingError(
        "Some of a record is picked by whole numbers or a slice of them; layers, experts and tokens also by names or "
        "patterns, tokens also by a mask of shape (N,).",
        received=f"{wanted!r}"[:200],
        remedy="pass numbers from 0, texts, or True and False for each recorded token",
    )


def row_of(ids: Any) -> list[int]:
    """Token ids of one text; also as the one row of a batch.

    Raises:
        RoutingError: they are something else.
    """
    rows = own(ids)
    alone = isinstance(rows, list) and len(cast("list[Any]", rows)) == 1 and isinstance(rows[0], list)
    row = plain(rows[0] if alone else rows, names=False)
    if not isinstance(row, list):
        raise RoutingError("A text is found by a row of token ids.", received=f"{ids!r}"[:200], remedy="pass ids[0]")
    return cast("list[int]", row)


def is_mask(wanted: Any) -> bool:
    """Whether it says of each token if it stays."""
    return isinstance(wanted, list) and bool(wanted) and all(isinstance(one, bool) for one in cast("list[Any]", wanted))


def counted(number: int, what: str) -> str:
    """1 token, 2 tokens."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def pick(what: str, names: Sequence[str], wanted: Plain) -> list[int]:
    """The numbers of the names that are wanted, in the order in which they are asked for, each once.

    Args:
        what: what they name.
        names: all of them.
        wanted: numbers, names, patterns as in file names, or a slice of the numbers.

    Raises:
        RoutingError: one that nothing matches.
    """
    if isinstance(wanted, slice):
        found = list(range(len(names))[wanted])
        if not found:
            raise _unknown(what, names, wanted)
        return found
    several = [wanted] if isinstance(wanted, int | str) else list(wanted)
    found = dict.fromkeys(i for one in several for i in _matches(what, names, one))
    if not found:
        raise _unknown(what, names, wanted)
    return list(found)


def _matches(what: str, names: Sequence[str], wanted: int | str) -> list[int]:
    if isinstance(wanted, str):
        found = [i for i, name in enumerate(names) if name == wanted]
        found = found or [i for i, name in enumerate(names) if fnmatchcase(name, wanted)]
    else:
        found = [wanted % len(names)] if -len(names) <= wanted < len(names) else []
    if not found:
        raise _unknown(what, names, wanted)
    return found


def some(names: Sequence[Any]) -> str:
    """The first names, as they are told in an error."""
    return ", ".join(map(repr, names[:8])) + (f", … ({len(names)})" if len(names) > 8 else "")


def _unknown(what: str, names: Sequence[str], wanted: Any) -> RoutingError:
    return RoutingError(
        f"A {what} is picked by its number, its name or a pattern.",
        received=f"{wanted!r}, which none of the {len(names)} matches: {some(names)}",
        remedy=f"pass a number from 0 to {len(names) - 1}, a name, or a pattern such as '*{names[0][-6:]}'",
    )


def chosen_rows(
    part: Part, tokens: Plain | None, sequences: int | slice | Sequence[int] | None, texts: Sequence[str] | None
) -> Bool[Tensor, " N"]:
    """True at the tokens that are wanted.

    Args:
        part: all tokens.
        tokens: positions, patterns of the text, or the answer itself.
        sequences: numbers of texts, or a slice of them.
        texts: of the tokens, where a pattern may need them.

    Raises:
        RoutingError: numbers from the end, which texts of different length do not share; an answer of another length.
    """
    stays = torch.ones(len(part), dtype=torch.bool)
    if isinstance(sequences, slice):
        stays &= _in_slice(part.sequence, sequences, "sequences")
    elif sequences is not None:
        numbers = [sequences] if isinstance(sequences, int) else list(sequences)
        stays &= torch.isin(part.sequence, torch.tensor(numbers, dtype=torch.long))
    if tokens is None:
        return stays
    if is_mask(tokens):
        mask = torch.tensor(tokens)
        if mask.shape != stays.shape:
            raise RoutingError(
                "A mask has one value for each recorded token.",
                received=f"{len(mask)} values for {len(part)} tokens",
                remedy="make it from the record's own tensors, such as record.tokens == 13",
            )
        return stays & mask
    if isinstance(tokens, slice):
        return stays & _in_slice(part.position, tokens, "tokens")
    several = [tokens] if isinstance(tokens, int | str) else list(tokens)
    positions = [one for one in several if not isinstance(one, str)]
    _refuse_negative(positions, f"tokens={tokens!r}")
    wanted = torch.isin(part.position, torch.tensor(positions, dtype=torch.long))
    patterns = [one for one in several if isinstance(one, str)]
    if patterns:
        matches = [any(text == one or fnmatchcase(text, one) for one in patterns) for text in texts or ()]
        wanted |= torch.tensor(matches, dtype=torch.bool)
    return stays & wanted


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
