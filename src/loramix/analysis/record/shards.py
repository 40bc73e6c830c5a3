"""The files that hold a record's tokens: one part of it each, marked with the record's id."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from loramix.analysis.record.part import Part
from loramix.errors import CorruptCheckpointError, IncompleteCheckpointError
from loramix.files.journal import current
from loramix.files.tensors import metadata_of, read_tensors, write_tensors

FORMAT, VERSION = "loramix routing record", 1


class FileSource:
    """A record's tokens in files, read when they are asked for; the tensors are mapped, not copied.

    Args:
        folder: where the files are.
        sizes: the number of tokens in each file, by its name.
        id: the record's.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], id: str) -> None:
        self.folder, self.sizes, self.id = folder, dict(sizes), id

    @property
    def kept(self) -> int:
        """The number of tokens."""
        return sum(self.sizes.values())

    def parts(self) -> Iterator[Part]:
        """The files, one after the other.

        Raises:
            IncompleteCheckpointError: a file is missing.
            CorruptCheckpointError: a file is damaged, or no longer one of this record.
        """
        for name in self.sizes:
            yield read_shard(self.folder / name, self.id)


def new_id() -> str:
    """A new record id: it marks the files that belong together."""
    return uuid.uuid4().hex


def shard_name(number: int) -> str:
    """The name of a file of tokens."""
    return f"tokens-{number:05d}.safetensors"


def shard_writer(part: Callable[[], Part], record: str) -> Callable[[Path], None]:
    """A function that writes a part of the record with this id to a path."""
    return lambda path: write_tensors(path, part().tensors(), record=record)


def read_shard(path: Path, id: str) -> Part:
    """Read a file of the record with this id.

    Raises:
        IncompleteCheckpointError: it is missing.
        CorruptCheckpointError: it is damaged, or another record's.
    """
    place = current(path)
    if not place.is_file():
        raise IncompleteCheckpointError(
            "A record needs every file that its record.json names.",
            received=f"no {path.name} in {path.parent}",
            remedy="copy the whole folder again",
        )
    tensors = read_tensors(place)
    if metadata_of(place).get("record") != id:
        raise corrupt(path, "a file of another record, which was saved over this one or copied between its files")
    names = [field.name for field in fields(Part)]
    if sorted(tensors) != sorted(names):
        raise corrupt(path, f"tensors {', '.join(sorted(tensors))}")
    token, scalings = tensors["token"], tensors["scalings"]
    for name in names[:-1]:
        if tensors[name].dim() != 1 or tensors[name].shape != token.shape or tensors[name].dtype != torch.int64:
            raise corrupt(path, f"{name} of shape {tuple(tensors[name].shape)} and dtype {tensors[name].dtype}")
    if scalings.dim() != 3 or len(scalings) != len(token) or scalings.dtype != torch.float32:
        raise corrupt(path, f"scalings of shape {tuple(scalings.shape)} and dtype {scalings.dtype}")
    return Part(**tensors)


def corrupt(path: Path, found: str) -> CorruptCheckpointError:
    """The error for a file that is not what the format says."""
    return CorruptCheckpointError(
        f"A routing record is what {FORMAT!r}, version {VERSION}, says.",
        received=f"{path}: {found}",
        remedy="save it again, or read it with the version of loramix that wrote it",
    )
