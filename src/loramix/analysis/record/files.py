"""A record on disk: a folder with `record.json` and the tokens in files of safetensors.

`record.json`, version 1:

    {"format": "loramix routing record", "version": 1, "id": "9c1d…",
     "experts": […], "palette": […], "layers": […], "adapted": […],      names; layers is ["all layers"] if shared
     "settings": {…}, "changed": false,                                  of the mixture
     "forks": {"7": [2, 31]},                                            text 7 goes on with text 2 after 31 tokens
     "seen": 120, "sample": false,
     "pieces": {"13": " the"},                                           token id -> its text on its own
     "shards": [{"file": "tokens-00000.safetensors", "tokens": 120}]}

Each shard holds `sequence`, `position` and `token`, int64 (N,), and `scalings`, float32 (N, L, E); its metadata has the
record's id as `record`.
`record.json` is put in place last: without it the folder holds no record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch

from loramix.analysis.record.header import Header
from loramix.analysis.record.parts import Part, Shards, new_id, shard_name, shard_writer
from loramix.analysis.record.pieces import one_by_one
from loramix.analysis.record.record import RoutingRecord
from loramix.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    RoutingError,
)
from loramix.files.atomic import Writer, save_files
from loramix.files.journal import current
from loramix.files.json_file import read_json_object
from loramix.files.tensors import metadata_of, read_tensors

FORMAT, VERSION, INDEX = "loramix routing record", 1, "record.json"


class FileParts:
    """Parts that are read when they are asked for; the tensors are mapped, not copied.

    Args:
        folder: where.
        sizes: tokens of each file, by its name.
        id: of the record.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], id: str) -> None:
        self.folder, self.sizes, self.id = folder, dict(sizes), id

    @property
    def kept(self) -> int:
        """How many tokens there are."""
        return sum(self.sizes.values())

    def parts(self) -> Iterator[Part]:
        """One after the other.

        Raises:
            IncompleteCheckpointError: a file is missing.
            CorruptCheckpointError: a file is not what it should be, or not of this record any more.
        """
        for name in self.sizes:
            yield read_part(self.folder / name, self.id)


def read_part(path: Path, id: str) -> Part:
    """A shard of the record with this id.

    Raises:
        IncompleteCheckpointError: it is missing.
        CorruptCheckpointError: it is not what it should be, or another record's.
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
        raise _corrupt(path, "a file of another record, which was saved over this one or copied between its files")
    names = [field.name for field in fields(Part)]
    if sorted(tensors) != sorted(names):
        raise _corrupt(path, f"tensors {', '.join(sorted(tensors))}")
    token, scalings = tensors["token"], tensors["scalings"]
    for name in names[:-1]:
        if tensors[name].dim() != 1 or tensors[name].shape != token.shape or tensors[name].dtype != torch.int64:
            raise _corrupt(path, f"{name} of shape {tuple(tensors[name].shape)} and dtype {tensors[name].dtype}")
    if scalings.dim() != 3 or len(scalings) != len(token) or scalings.dtype != torch.float32:
        raise _corrupt(path, f"scalings of shape {tuple(scalings.shape)} and dtype {scalings.dtype}")
    return Part(**tensors)


def save_record(record: RoutingRecord, folder: Path) -> None:
    """Write a record, over an earlier one if there is one. One that lies in files keeps its id in others, too.

    Raises:
        SaveError: the folder could not be written.
    """
    sizes = {shard_name(i): len(part) for i, part in enumerate(record.parts())}
    parts = record.parts()  # each writer takes the next one: they run in order
    id = record.source.id or new_id()
    writers: dict[str, Writer] = {name: shard_writer(parts.__next__, id) for name in sizes}
    writers[INDEX] = _index_writer(record, sizes, id)
    old = [path.name for path in folder.glob("tokens-*.safetensors")] if folder.is_dir() else []
    save_files(folder, writers, removed=[name for name in old if name not in sizes])


def _index_writer(record: RoutingRecord, sizes: Mapping[str, int], id: str) -> Writer:
    content = {"format": FORMAT, "version": VERSION, "id": id} | vars(record.header) | {"palette": record.palette}
    content["pieces"] = record.vocabulary()
    content["shards"] = [{"file": name, "tokens": size} for name, size in sizes.items()]
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def new_folder(path: str | PathLike[str]) -> Path:
    """A folder to spill into: made, or empty.

    Raises:
        ConfigurationError: it holds something, or is a file.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            "A record is spilled into a new or empty folder.",
            received=f"spill={str(folder)!r}, which holds something",
            remedy="pass another folder, or empty that one",
        )
    return folder


def finish_folder(store: Shards, record: RoutingRecord) -> FileParts:
    """Write the rest of a spilled record, and its `record.json`; where its tokens are then.

    Raises:
        SaveError: the folder could not be written.
    """
    store.flush()
    sizes = {shard_name(i): size for i, size in enumerate(store.sizes)}
    save_files(store.folder, {INDEX: _index_writer(record, sizes, store.id)})
    return FileParts(store.folder, sizes, store.id)


def load_record(folder: Path, tokenizer: Any = None) -> RoutingRecord:
    """Read a record, and check its files against its `record.json`.

    Raises:
        CheckpointNotFoundError: no `record.json`.
        CorruptCheckpointError: files that are not what they should be.
        IncompleteCheckpointError: a shard is missing.
        RoutingError: what is no tokenizer, or one to which the tokens are other text.
    """
    place = current(folder / INDEX)
    if not place.is_file():
        raise CheckpointNotFoundError(
            "A record is a folder with record.json.",
            received=f"none in {folder}",
            remedy="pass a folder that RoutingRecord.save or record_routing(spill=…) wrote to the end",
        )
    content = read_json_object(place)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise _corrupt(place, f"format {content.get('format')!r}, version {content.get('version')!r}")
    try:
        pieces, sizes, id = _pieces(content), _sizes(content), str(content["id"])
        header = _header(content, kept=sum(sizes.values()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _corrupt(place, f"{type(error).__name__}: {error}") from error
    for name, size in sizes.items():
        part = read_part(folder / name, id)
        expected = (size, len(header.layers), len(header.experts))
        if part.scalings.shape != expected:
            raise _corrupt(folder / name, f"scalings of shape {tuple(part.scalings.shape)} instead of {expected}")
    record = RoutingRecord(header, FileParts(folder, sizes, id), tokenizer, pieces)
    if tokenizer is not None:
        _require_same_text(tokenizer, pieces)
    return record


def _require_same_text(tokenizer: Any, pieces: Mapping[int, str]) -> None:
    """Raises RoutingError: not the tokenizer that the record was saved with."""
    read = one_by_one(tokenizer, pieces)
    wrong = next((token for token in pieces if read.get(token) != pieces[token]), None)
    if wrong is not None:
        raise RoutingError(
            "A record's text is read with the tokenizer of its mixture.",
            received=f"one to which token {wrong} is {read.get(wrong)!r}, where the record has {pieces[wrong]!r}",
            remedy="pass the tokenizer of the mixture that was recorded, or none",
        )


def _header(content: Mapping[str, Any], kept: int) -> Header:
    names = {name: _names(content[name]) for name in ("experts", "palette", "layers", "adapted")}
    forks = {int(one): (int(other), int(place)) for one, (other, place) in content["forks"].items()}
    if any(not 0 <= other < one or place < 0 for one, (other, place) in forks.items()):
        raise ValueError("a text that forks from none before it")
    if not set(names["experts"]) <= set(names["palette"]):
        raise ValueError("experts that the palette lacks")
    if not isinstance(content["seen"], int) or content["seen"] < kept:
        raise ValueError(f"{content['seen']} tokens seen")
    return Header(
        **names,
        settings=dict(content["settings"]),
        changed=bool(content["changed"]),
        forks=forks,
        seen=content["seen"],
        sample=bool(content["sample"]),
    )


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in cast("list[Any]", value)):
        raise ValueError(f"{value!r} is no list of names")
    names = cast("list[str]", value)
    if len(set(names)) < len(names):
        raise ValueError(f"{value!r} has a name twice")
    return names


def _pieces(content: Mapping[str, Any]) -> dict[int, str]:
    return {int(token): str(text) for token, text in content["pieces"].items()}


def _sizes(content: Mapping[str, Any]) -> dict[str, int]:
    shards = cast("Sequence[Mapping[str, Any]]", content["shards"])
    if not isinstance(shards, list):
        raise ValueError(f"shards {shards!r}")
    sizes = {str(shard["file"]): int(shard["tokens"]) for shard in shards}
    if list(sizes) != [shard_name(i) for i in range(len(shards))]:
        raise ValueError(f"files {', '.join(sizes)}")
    return sizes


def _corrupt(path: Path, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"A routing record is what {FORMAT!r}, version {VERSION}, says.",
        received=f"{path}: {found}",
        remedy="save it again, or read it with the version of loramix that wrote it",
    )
