"""What PEFT's formats share: the names of the files, `peft_type`, and which files a save may replace."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from torch import Tensor

from loramix.config.base import PeftConfig, PeftType
from loramix.config.folder import CONFIG_NAME, ORIGINAL_CONFIG_NAME, recognised
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompleteCheckpointError, SaveError
from loramix.files.json_file import read_json_object
from loramix.files.location import Location
from loramix.files.tensors import is_ours, read_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
READ_NAMES = (WEIGHTS_NAME, "adapter_model.bin")
INDEX_NAMES = ("adapter_model.safetensors.index.json", "adapter_model.bin.index.json", "model.safetensors.index.json")
"""Of shards; transformers gives an adapter's index the name of a model's."""
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(?:safetensors|bin)")


def peft_type(location: Location) -> object:
    """`peft_type` in `adapter_config.json`; None if it is missing, or the file is.

    None as well for an expert that lies in the folder of a mixture of the original library.

    Raises:
        CheckpointNotFoundError: no such folder or repository.
        CorruptCheckpointError: a configuration that cannot be read.
    """
    path = location.find(CONFIG_NAME)
    found = None if path is None else read_json_object(path).get("peft_type")
    beside = path is not None and found == PeftType.LORA and path.with_name(ORIGINAL_CONFIG_NAME).exists()
    return None if beside else found


def find_weights(location: Location) -> Path:
    """The file with an adapter's tensors; safetensors takes precedence over the pickle.

    Raises:
        CheckpointNotFoundError: the folder has neither.
    """
    path = location.find(*READ_NAMES)
    if path is None:
        found, remedy = recognised(location) or (
            "which has neither",
            "Give the folder that save_pretrained wrote, or save the adapter again.",
        )
        raise CheckpointNotFoundError(
            f"An adapter's folder holds {' or '.join(READ_NAMES)}.",
            received=f"{str(location)!r}, {found}",
            remedy=remedy,
        )
    return path


def read_weights(location: Location) -> dict[str, Tensor]:
    """An adapter's tensors by their keys, of one file or of its shards.

    Raises:
        CheckpointNotFoundError: the folder has neither.
        CorruptCheckpointError: a file that cannot be read, an index that names other files than shards, or a tensor in
            two of them.
        IncompleteCheckpointError: a shard that is missing, or a tensor that is not in its shard.
    """
    shards = None if location.find(*READ_NAMES) else _shards(location)
    if shards is None:
        return read_tensors(find_weights(location))
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(shards.values()):
        path = location.find(shard)
        held = {} if path is None else read_tensors(path)
        absent = [key for key, place in shards.items() if place == shard and key not in held]
        if absent:
            raise IncompleteCheckpointError(
                "The shards of an adapter hold the tensors that its index names.",
                received=f"{str(location)!r}: {shard} {'is missing' if path is None else 'lacks ' + repr(absent[0])}",
                remedy="Download it again, or save the adapter again.",
            )
        repeated = [key for key in held if key in tensors]
        if repeated:
            raise CorruptCheckpointError(
                "The shards of an adapter hold each tensor once.",
                received=f"{str(location)!r}: {repeated[0]!r} in {shard} and in an earlier one",
                remedy="Save the adapter again.",
            )
        tensors |= held
    return tensors


def _shards(location: Location) -> dict[str, str] | None:
    """Key -> the shard's name, by the index; None if the folder has no index of an adapter's shards."""
    path = location.find(*INDEX_NAMES)
    if path is None:
        return None
    shards = read_json_object(path).get("weight_map")
    names = cast("dict[str, object]", shards) if isinstance(shards, dict) else {}
    if not names or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names.values()):
        if path.name == INDEX_NAMES[-1]:
            return None  # of a model's own shards
        raise CorruptCheckpointError(
            "The index of an adapter names its shards: adapter_model-00001-of-00002.safetensors.",
            received=f"{path}: weight_map={str(shards)[:200]}",
            remedy="Download it again, or save the adapter again.",
        )
    return cast("dict[str, str]", names)


def check_replaceable(folder: str | os.PathLike[str], kind: type[PeftConfig] = XLoraConfig) -> None:
    """Refuse to replace an adapter that loramix did not write, or one of another kind.

    Args:
        folder: where to save; it may not exist yet.
        kind: the class of the configuration to save; a mixture's by default.

    Raises:
        SaveError: naming what is there.
    """
    place = Path(folder)
    present = [name for name in (CONFIG_NAME, *READ_NAMES) if (place / name).exists()]
    if present and not is_ours(place / WEIGHTS_NAME):
        raise occupied(place, f"{', '.join(present)} that loramix did not write")
    if CONFIG_NAME in present and not isinstance(PeftConfig.from_json_file(place / CONFIG_NAME), kind):
        raise occupied(place, "an adapter of another kind")


def check_expert_folders(folder: Path, names: Iterable[str], *, of_mixture: bool) -> None:
    """Refuse to replace experts that loramix did not write, or that were there before the mixture was saved.

    Args:
        folder: the mixture's folder.
        names: the experts', which are those of their folders.
        of_mixture: whether the folder holds a mixture already.

    Raises:
        SaveError: naming what is there.
    """
    for place in (folder / name for name in names):
        if place.is_symlink():
            raise occupied(place, "a link")
        check_replaceable(place, LoraConfig)
        if not of_mixture and (place / CONFIG_NAME).exists():
            raise occupied(place, "an expert that is no part of a mixture")


def occupied(folder: Path, content: str) -> SaveError:
    """The error for a folder with files that a save does not replace."""
    return SaveError(
        "A save replaces only what an earlier save of the same kind left there.",
        received=f"{str(folder)!r}, with {content}",
        remedy="Save to another folder, or move that adapter away.",
    )
