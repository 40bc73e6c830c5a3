"""Rewriting a saved mixture with other experts: what `loramix edit` does, by the edits of `loramix.formats`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramix.errors import ConfigurationError
from loramix.files.location import Location
from loramix.formats import (
    XLoraFormat,
    add_expert,
    load_adapter,
    load_mixture,
    remove_expert,
    rename_expert,
    reorder_experts,
    replace_expert,
)
from loramix.model.convert import check_empty, left_behind, save_as


@dataclass(frozen=True)
class Edit:
    """What `edit` did.

    Args:
        source: what was read.
        folder: what was written.
        before: the experts in the source, in order.
        experts: those in the folder.
        notes: what there is to know, one sentence each.
    """

    source: str
    folder: str
    before: tuple[str, ...]
    experts: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The edit in JSON's types."""
        return asdict(self)


def edit(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    remove: Sequence[str] = (),
    replace: Mapping[str, str | os.PathLike[str]] | None = None,
    rename: Mapping[str, str] | None = None,
    add: Mapping[str, str | os.PathLike[str]] | None = None,
    order: Sequence[str] = (),
) -> Edit:
    """Read a mixture in any registered format, edit its experts in this order, and write it in loramix's layout.

    Args:
        source: folder or Hub id of the mixture.
        folder: a new or empty folder.
        remove: experts to remove.
        replace: expert -> folder or Hub id of the one that takes its place, with the router as it is.
        rename: expert -> its new name, one after the other.
        add: name -> folder or Hub id of a new expert, which is cold: see `loramix.formats.add_expert`.
        order: the names of all experts, as they then are, in the order that they are to have.

    Raises:
        ConfigurationError: nothing to do; or as the edits.
        SaveError: a folder with something in it, or one that cannot be written.
        CheckpointError, AdapterError, UnsupportedOperationError: as `load_mixture`, `load_adapter` and the edits.
    """
    replace, rename, add = replace or {}, rename or {}, add or {}
    if not (remove or replace or rename or add or order):
        raise ConfigurationError(
            "An edit removes, replaces, renames, adds or reorders experts.",
            received="none of these",
            remedy="say what to do, for example remove=['math']",
        )
    place = Path(folder)
    check_empty(place)
    mixture = load_mixture(source)
    before = tuple(expert.name for expert in mixture.experts)
    for name in remove:
        mixture = remove_expert(mixture, name)
    for name, path in replace.items():
        mixture = replace_expert(mixture, name, load_adapter(name, path))
    for old, new in rename.items():
        mixture = rename_expert(mixture, old, new)
    for name, path in add.items():
        mixture = add_expert(mixture, load_adapter(name, path))
    if order:
        mixture = reorder_experts(mixture, order)
    save_as(place, mixture, XLoraFormat.name)
    cold = [
        f"{name} is cold: the router gives it no weight until it is trained, or fit_expert gives it a column."
        for name in add
    ]
    return Edit(
        source=os.fspath(source),
        folder=os.fspath(folder),
        before=before,
        experts=tuple(expert.name for expert in mixture.experts),
        notes=(*cold, *left_behind(Location(source), mixture, before)),
    )
