"""Selecting experts, layers or tokens by number, name or pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, SupportsIndex, cast

from loramix.errors import RoutingError

Selection = SupportsIndex | str | slice | Iterable[SupportsIndex | str]
"""What a caller passes: a number, a name, a pattern as in file names, a slice, or several of the first three."""
PlainSelection = int | str | slice | Sequence[int | str]
"""The same in Python's own numbers and lists."""


def as_python(value: Any) -> Any:
    """A tensor, an array or a column of a table as Python's own numbers and lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def plain_selection(selection: Any, *, names: bool = True, mask: bool = False) -> Any:
    """A selection in Python's own numbers, slices and lists, whatever tensors, arrays or tables it came in.

    Args:
        selection: what a caller passed; None stays None.
        names: whether names and patterns are allowed.
        mask: whether a list of True and False is allowed.

    Raises:
        RoutingError: it is something else.
    """
    if selection is None or (names and isinstance(selection, str)):
        return selection
    if isinstance(selection, slice):
        ends = [
            None if end is None else _number(end, selection)
            for end in (selection.start, selection.stop, selection.step)
        ]
        if ends[2] == 0:
            raise _no_selection(selection)
        return slice(*ends)
    found = as_python(selection)
    if isinstance(found, str) or not isinstance(found, Iterable):
        return _number(found, selection)
    several = [one.item() if hasattr(one, "item") else one for one in cast("Iterable[Any]", found)]
    if mask and is_mask(several):
        return several
    return [one if names and isinstance(one, str) else _number(one, selection) for one in several]


def _number(value: Any, selection: Any) -> int:
    """A whole number that fits into a tensor of int64."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or abs(value.__index__()) >= 2**62:
        raise _no_selection(selection)
    return value.__index__()


def _no_selection(selection: Any) -> RoutingError:
    return RoutingError(
        "A selection is made by whole numbers or a slice of them; of layers, experts and tokens also by names or "
        "patterns, of tokens also by a mask of shape (N,).",
        received=f"{selection!r}"[:200],
        remedy="pass numbers from 0, texts, or True and False for each recorded token",
    )


def is_mask(selection: Any) -> bool:
    """Whether a selection is a list of True and False."""
    return (
        isinstance(selection, list)
        and bool(selection)
        and all(isinstance(one, bool) for one in cast("list[Any]", selection))
    )


def select(what: str, names: Sequence[str], selection: PlainSelection) -> list[int]:
    """The places of the selected names, in the order of the selection, each once.

    Args:
        what: what the names are of, for the error: "expert", "layer".
        names: all names.
        selection: numbers, names, patterns as in file names, or a slice of the numbers.

    Raises:
        RoutingError: a number, name or pattern that matches nothing.
    """
    if isinstance(selection, slice):
        found = list(range(len(names))[selection])
        if not found:
            raise _unknown(what, names, selection)
        return found
    several = [selection] if isinstance(selection, int | str) else list(selection)
    found = dict.fromkeys(i for one in several for i in _matches(what, names, one))
    if not found:
        raise _unknown(what, names, selection)
    return list(found)


def _matches(what: str, names: Sequence[str], selection: int | str) -> list[int]:
    if isinstance(selection, str):
        found = [i for i, name in enumerate(names) if name == selection]
        found = found or [i for i, name in enumerate(names) if fnmatchcase(name, selection)]
    else:
        found = [selection % len(names)] if -len(names) <= selection < len(names) else []
    if not found:
        raise _unknown(what, names, selection)
    return found


def _unknown(what: str, names: Sequence[str], selection: Any) -> RoutingError:
    return RoutingError(
        f"A {what} is selected by its number, its name or a pattern.",
        received=f"{selection!r}, which none of the {len(names)} matches: {listed(names)}",
        remedy=f"pass a number from 0 to {len(names) - 1}, a name, or a pattern such as '*{names[0][-6:]}'",
    )


def listed(names: Sequence[Any]) -> str:
    """The first eight names, for an error message."""
    return ", ".join(map(repr, names[:8])) + (f", … ({len(names)})" if len(names) > 8 else "")
