"""Checks on the values of configurations. Each raises ConfigurationError with the rule, the value and a remedy."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast, no_type_check

from loramix.errors import ConfigurationError

_PACKAGE = str(Path(__file__).parent)


@no_type_check  # a run-time type checker adds a frame of its own
def warn(message: str) -> None:
    """Warn, at the line of the caller outside this package and outside a dataclass's generated `__init__`."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and (
        frame.f_code.co_filename == "<string>" or frame.f_code.co_filename.startswith(_PACKAGE)
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def require(holds: bool, rule: str, *, received: str, remedy: str) -> None:
    """Raise ConfigurationError unless the rule holds."""
    if not holds:
        raise ConfigurationError(rule, received=received, remedy=remedy)


_LARGEST_INTEGER = 2**31 - 1
_LARGEST_NUMBER = 3.4e38  # what float32 holds


def require_integer(name: str, value: object, *, at_least: int | None, remedy: str) -> None:
    """A whole number, at least `at_least`, and small enough for a dimension of a tensor."""
    bound = "" if at_least is None else f" of at least {at_least}"
    require(
        isinstance(value, int)
        and not isinstance(value, bool)
        and (at_least is None or value >= at_least)
        and abs(value) <= _LARGEST_INTEGER,
        f"{name} must be a whole number{bound}.",
        received=f"{name}={value!r}",
        remedy=remedy,
    )


def require_finite(name: str, value: object, *, remedy: str) -> None:
    """A number that is finite in float32, and not NaN."""
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER,
        f"{name} must be a finite number.",
        received=f"{name}={value!r}",
        remedy=remedy,
    )


def require_probability(name: str, value: object) -> None:
    """A dropout probability: from 0 to 1."""
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
        f"{name} must be in [0, 1].",
        received=f"{name}={value!r}",
        remedy=f"Use {name}=0.0 for no dropout, or a value up to 1.",
    )


def require_switch(name: str, value: object) -> None:
    """True or False; other truthy or falsy values are refused."""
    require(
        isinstance(value, bool),
        f"{name} must be True or False.",
        received=f"{name}={value!r}",
        remedy=f"Write {name}=True or {name}=False.",
    )


def require_text(name: str, value: object) -> None:
    """Text, or None."""
    require(
        value is None or isinstance(value, str),
        f"{name} must be text, or None.",
        received=f"{name}={value!r}",
        remedy=f"Write {name} as text, or None to leave it open.",
    )


def require_mapping(name: str, value: object) -> None:
    """A mapping whose keys are texts."""
    require(
        isinstance(value, Mapping) and all(isinstance(key, str) for key in cast("Mapping[object, object]", value)),
        f"{name} must map expressions to numbers.",
        received=f"{name}={value!r}",
        remedy=f'Write {name} as a mapping, for example {{"q_proj": 4}}, or leave it empty.',
    )


def require_names(name: str, value: object) -> None:
    """One text or a collection of texts, or None."""
    require(
        value is None or all(isinstance(item, str) for item in _items(value)),
        f"{name} must be a list of names, or one text, or None.",
        received=f"{name}={value!r}",
        remedy=f'Write {name} as a list of texts, for example ["q_proj"].',
    )


def require_indices(name: str, value: object) -> None:
    """One whole number or a collection of them, or None."""
    require(
        value is None or all(map(_is_integer, _items(value))),
        f"{name} must be a whole number, or a list of them, or None.",
        received=f"{name}={value!r}",
        remedy=f"Write {name} as a list of block indices, for example [0, 1].",
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _items(value: object) -> Collection[object]:
    """The items of a collection; of anything else, texts included, the value itself."""
    kinds = (list, tuple, set, frozenset, range)
    return cast("Collection[object]", value) if isinstance(value, kinds) else (value,)


def require_expression(name: str, value: str) -> None:
    """A regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigurationError(
            f"{name} must be a regular expression.",
            received=f"{value!r}: {error}",
            remedy="Correct the expression; a literal name needs its special characters escaped.",
        ) from error
