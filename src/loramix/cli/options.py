"""Options that are written as NAME=VALUE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer


def named_paths(words: Sequence[str], option: str = "--expert", form: str = "NAME=PATH") -> dict[str, str]:
    """Options such as `math=./math` as name -> path, in their order; `option` and `form` are for messages."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{word!r} is not {form}", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"{name!r} is named twice", param_hint=option)
        found[name] = path
    return found


def as_changes(words: Sequence[str], groups: Sequence[str] | None = None) -> dict[str, Any]:
    """Options such as `trainer.max_steps=10` as dotted key -> value; values are YAML.

    Args:
        words: the arguments of --set.
        groups: the groups that a key may begin with; None allows any.
    """
    import yaml

    from loramix.training.settings import with_numbers

    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{word!r} is not KEY=VALUE", param_hint="--set")
        if groups is not None and (key.partition(".")[0] not in groups or "." not in key):
            raise typer.BadParameter(f"{key!r} begins with none of {', '.join(groups)}", param_hint="--set")
        try:
            found[key] = with_numbers(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{word!r}: {error}", param_hint="--set") from error
    return found
