"""A record on disk: a folder with `record.json` and the tokens in files of safetensors.

`record.json`, version 1:

    {"format": "loramix routing record", "version": 1, "id": "9c1d…",
     "experts": […], "palette": […], "layers": […], "adapted": […],      names; layers is ["all layers"] if shared
     "settings": {…}, "changed": false,                                  of the mixture
     "forks": {"7": [2, 31]},                                            text 7 continues text 2 after 31 tokens
     "encoder_texts": [0],                                               those that an encoder has read
     "seen": 120, "sample": false,
     "pieces": {"13": " the"},                                           token id -> its text on its own
     "shards": [{"file": "tokens-00000.safetensors", "tokens": 120}]}

Each shard holds `sequence`, `position` and `token`, int64 (N,), and `scalings`, float32 (N, L, E); its metadata has the
record's id as `record`.
`record.json` is put in place last: without it the folder holds no record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from loramix.analysis.record.header import Header
from loramix.analysis.record.shards import (
    FORMAT,
    VERSION,
    FileSource,
    corrupt,
    new_id,
    read_shard,
    shard_name,
    shard_writer,
)
from loramix.analysis.record.stores import Source, SpillStore
from loramix.errors import CheckpointNotFoundError, ConfigurationError
from loramix.files.atomic import Writer, save_files, text_writer
from loramix.files.journal import current
from loramix.files.json_file import read_json_object

INDEX = "record.json"


@runtime_checkable
class RecordContents(Protocol):
    """The parts of a record that are written."""

    @property
    def header(self) -> Header: ...
    @property
    def source(self) -> Source: ...
    @property
    def palette(self) -> list[str]: ...
    def vocabulary(self) -> dict[int, str]: ...


def save_record(record: RecordContents, folder: Path) -> None:
    """Write a record, over an earlier one if there is one. A record that came from files keeps its id.

    Raises:
        SaveError: the folder could not be written.
    """
    sizes = {shard_name(i): len(part) for i, part in enumerate(record.source.parts())}
    parts = record.source.parts()  # each writer takes the next one: they run in order
    id = record.source.id or new_id()
    writers: dict[str, Writer] = {name: shard_writer(parts.__next__, id) for name in sizes}
    writers[INDEX] = _index_writer(record, sizes, id)
    old = [path.name for path in folder.glob("tokens-*.safetensors")] if folder.is_dir() else []
    save_files(folder, writers, removed=[name for name in old if name not in sizes])


def _index_writer(record: RecordContents, sizes: Mapping[str, int], id: str) -> Writer:
    content = {"format": FORMAT, "version": VERSION, "id": id} | vars(record.header) | {"palette": record.palette}
    content["pieces"] = record.vocabulary()
    content["shards"] = [{"file": name, "tokens": size} for name, size in sizes.items()]
    return text_writer(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def new_folder(path: str | PathLike[str]) -> Path:
    """The folder to spill a record into; it is new or empty.

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


def finish_spill(store: SpillStore, record: RecordContents) -> FileSource:
    """Write the remaining tokens of a spilled record and its `record.json`; its tokens are read from there on.

    Raises:
        SaveError: the folder could not be written.
    """
    store.flush()
    sizes = {shard_name(i): size for i, size in enumerate(store.sizes)}
    save_files(store.folder, {INDEX: _index_writer(record, sizes, store.id)})
    return FileSource(store.folder, sizes, store.id)


def load_record(folder: Path) -> tuple[Header, FileSource, dict[int, str]]:
    """Read a record's header, source and vocabulary, and check its files against its `record.json`.

    Raises:
        CheckpointNotFoundError: no `record.json`.
        CorruptCheckpointError: invalid files.
        IncompleteCheckpointError: a shard is missing.
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
        raise corrupt(place, f"format {content.get('format')!r}, version {content.get('version')!r}")
    try:
        vocabulary, sizes, id = _vocabulary(content), _sizes(content), str(content["id"])
        header = _header(content, kept=sum(sizes.values()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise corrupt(place, f"{type(error).__name__}: {error}") from error
    for name, size in sizes.items():
        part = read_shard(folder / name, id)
        expected = (size, len(header.layers), len(header.experts))
        if part.scalings.shape != expected:
            raise corrupt(folder / name, f"scalings of shape {tuple(part.scalings.shape)} instead of {expected}")
    return header, FileSource(folder, sizes, id), vocabulary


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
        encoder_texts=[int(number) for number in content.get("encoder_texts", ())],
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


def _vocabulary(content: Mapping[str, Any]) -> dict[int, str]:
    return {int(token): str(text) for token, text in content["pieces"].items()}


def _sizes(content: Mapping[str, Any]) -> dict[str, int]:
    shards = cast("Sequence[Mapping[str, Any]]", content["shards"])
    if not isinstance(shards, list):
        raise ValueError(f"shards {shards!r}")
    sizes = {str(shard["file"]): int(shard["tokens"]) for shard in shards}
    if list(sizes) != [shard_name(i) for i in range(len(shards))]:
        raise ValueError(f"files {', '.join(sizes)}")
    return sizes
