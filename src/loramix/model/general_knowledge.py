"""Experts without what they know in general, as new folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from loramix.config.names import check_expert_names
from loramix.errors import ConfigurationError
from loramix.experts.general_knowledge import without_general_knowledge
from loramix.files.hub import HubOptions
from loramix.formats import load_adapter, save_adapter


def subtract_general_knowledge(
    experts: Mapping[str, str | PathLike[str]],
    general: Sequence[str | PathLike[str]],
    folder: str | PathLike[str],
    options: HubOptions | None = None,
) -> dict[str, str]:
    """Write each expert without the mean of the general ones (GenKnowSub) into a folder of its own.

    Args:
        experts: the experts, name -> folder or Hub id.
        general: folders or Hub ids of experts of general text.
        folder: where the new folders go, by the experts' names.
        options: how files are fetched.

    Returns:
        name -> folder, for `XLoraConfig(adapters=…)`.

    Raises:
        ConfigurationError: no experts, or no general ones.
        AdapterNameError: names that cannot be names of folders, or that clash.
        CheckpointError: as `load_adapter`.
        AdapterMismatchError, UnsupportedAdapterError: as `without_general_knowledge`.
        SaveError: as `save_adapter`.
    """
    if not experts or not general:
        raise ConfigurationError(
            "General knowledge is that of at least one expert, subtracted from at least one.",
            received=f"{len(experts)} experts, {len(general)} general ones",
            remedy='pass experts={"name": "folder", …} and general=["folder", …]',
        )
    check_expert_names(experts)
    shared = [load_adapter(str(place), place, options) for place in general]
    own = {name: load_adapter(name, place, options) for name, place in experts.items()}
    new = {name: without_general_knowledge(expert, shared) for name, expert in own.items()}
    for name, expert in new.items():
        save_adapter(Path(folder) / name, expert)
    return {name: str(Path(folder) / name) for name in new}
