"""The run-time checker behind the jaxtyping annotations: pytest's settings name `check`, conftest.py sets `jaxtyped`.

jaxtyping's own decorator binds the arguments of every call and has them checked twice, arrays in the signature or not:
that was half of the suite's time. Here beartype checks each argument and each result once, and only a function with
arrays in its signature has a context for their shapes. The other rules are jaxtyping's: an annotation that cannot be
resolved at run time is not checked; of a dataclass, `__init__` is. Protocols are left to the type checker: an
`isinstance` of one is slow, and from Python 3.12 on does not see the buffers of a module.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype

_CONTEXT = jaxtyping.jaxtyped("context")

# Functions are decorated, not classes, and beartype knows `Self` inside of decorated classes only: it is let pass.
# An int passes for a float, as type checkers have it.
check = beartype(
    conf=BeartypeConf(
        hint_overrides=FrozenDict({Self: object}), is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError
    )
)


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What jaxtyping's import hook decorates each function and class with."""

    def decorate(of: Any) -> Any:
        if not isinstance(of, type):
            return _checked(of, typechecker)
        if dataclasses.is_dataclass(of) and "__init__" in vars(of):
            of.__init__ = _checked(of.__init__, typechecker)
        return of

    return decorate


def _checked(function: Any, typechecker: Callable[[Any], Any]) -> Any:
    written, resolved = function.__annotations__, _resolved(function)
    function.__annotations__ = resolved
    checked = typechecker(function)
    function.__annotations__ = checked.__annotations__ = written
    if not any(map(_has_arrays, resolved.values())):
        return checked

    @functools.wraps(function)
    def in_a_context(*args: Any, **kwargs: Any) -> Any:
        with _CONTEXT:
            return checked(*args, **kwargs)

    return in_a_context


def _resolved(function: Any) -> dict[str, Any]:
    """The annotations as objects: Any for one that cannot be resolved."""

    def resolve(name: str, hint: object) -> object:
        alone = types.SimpleNamespace(__annotations__={name: hint})
        try:
            found = typing.get_type_hints(alone, function.__globals__, include_extras=True)[name]
            return Any if _has_protocol(found) else found
        except Exception:  # whatever an annotation raises when it is evaluated
            return Any

    return {name: resolve(name, hint) for name, hint in function.__annotations__.items()}


def _has_protocol(hint: object) -> bool:
    if isinstance(hint, list):
        return any(map(_has_protocol, hint))
    ours = isinstance(hint, type) and hint.__module__.startswith("loramix.")
    return (ours and getattr(hint, "_is_protocol", False)) or any(map(_has_protocol, typing.get_args(hint)))


def _has_arrays(hint: object) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_has_arrays, hint))
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_arrays, typing.get_args(hint)))
