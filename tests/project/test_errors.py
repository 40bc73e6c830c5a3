"""The exception tree: as drawn, picklable, and with rule, received and remedy in the message."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from loramix import errors
from loramix.errors import LoramixError, VersionError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LoramixError)]
LINE = re.compile(r"(?P<bars>[│ ]*)(?:[├└]── )?(?P<name>\w+Error)(?: \((?P<builtin>\w+)\))?")


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """class -> its parent and its built-in base, as the drawing at the top of the file has them."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    parents: list[str] = []
    for line in inspect.getdoc(errors).splitlines():
        if "LoramixError" not in line and "──" not in line:
            continue
        match = LINE.match(line)
        assert match, line
        depth = (line.index(match["name"])) // 4
        parents = [*parents[:depth], match["name"]]
        tree[match["name"]] = (parents[-2] if depth else None, match["builtin"])
    return tree


def test_the_tree_is_as_drawn() -> None:
    real: dict[str, tuple[str | None, str | None]] = {}
    for kind in CLASSES:
        ours = [base.__name__ for base in kind.__bases__ if issubclass(base, LoramixError)]
        builtin = [base.__name__ for base in kind.__bases__ if base.__module__ == "builtins" and base is not Exception]
        real[kind.__name__] = (next(iter(ours), None), next(iter(builtin), None))
    assert drawn() == real


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_says_rule_received_and_remedy_and_survives_pickling(kind: type[LoramixError]) -> None:
    error = kind("Rules hold.", received="a broken rule", remedy="mend it")
    for same in (error, pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(same) is kind
        lines = ("Rules hold.", "received: a broken rule", "remedy: mend it")
        assert str(same) == (" " if kind is VersionError else "\n  ").join(lines)
        assert (same.rule, same.received, same.remedy) == ("Rules hold.", "a broken rule", "mend it")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_says_what_it_is_for(kind: type[LoramixError]) -> None:
    assert kind.__doc__
    assert kind.__doc__ != LoramixError.__doc__ or kind is LoramixError
