"""The tokens of a record as tensors, and where they are kept while they come: a bounded sample, or files.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loramix.files.atomic import save_files
from loramix.files.tensors import write_tensors


@dataclass(frozen=True)
class Part:
    """Some of a record's tokens.

    Attributes:
        sequence: the number of the text that each was read in.
        position: its place among the text's tokens, from 0.
        token: its id; -1 where the model was given embeddings.
        scalings: s, what the layers mixed by, on the CPU.
    """

    sequence: Int[Tensor, " N"]
    position: Int[Tensor, " N"]
    token: Int[Tensor, " N"]
    scalings: Float[Tensor, "N L E"]

    def __len__(self) -> int:
        return len(self.token)

    def __getitem__(self, rows: Int[Tensor, " M"] | Bool[Tensor, " N"] | slice) -> Part:
        return Part(self.sequence[rows], self.position[rows], self.token[rows], self.scalings[rows])

    def by_text(self) -> Part:
        """The same in the order of the texts, and of the tokens in each."""
        order = torch.argsort(self.position, stable=True)
        return self[order[torch.argsort(self.sequence[order], stable=True)]]

    def run_starts(self) -> list[int]:
        """Which tokens do not follow the one before in its text: where runs of tokens begin."""
        follows = (self.sequence.diff() == 0) & (self.position.diff() == 1)
        return [0, *(torch.nonzero(~follows).flatten() + 1).tolist()] if len(self) else []

    def tensors(self) -> dict[str, Tensor]:
        """By name, as in a file."""
        return {name: tensor.contiguous() for name, tensor in vars(self).items()}


def joined(parts: Iterable[Part], layers: int, experts: int) -> Part:
    """All parts as one; without any, an empty one."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        none = torch.zeros(0, dtype=torch.long)
        return Part(none, none, none, torch.zeros(0, layers, experts))
    columns = zip(*(part.tensors().values() for part in parts), strict=True)
    return Part(*(torch.cat(column) for column in columns))


@runtime_checkable
class Source(Protocol):
    """Where tokens are; in files they have an id."""

    @property
    def kept(self) -> int: ...
    @property
    def id(self) -> str | None: ...
    def parts(self) -> Iterator[Part]:
        """What is kept when this is called, whatever is added while it is read."""
        ...


@runtime_checkable
class Store(Source, Protocol):
    """Where tokens are kept while they come."""

    def add(self, part: Part) -> None: ...


class _Rows:
    """Room for tokens that grows up to a bound: by doubling, so that adding one costs nothing much."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._room: Part | None = None

    def append(self, part: Part) -> None:
        """Add tokens for which there is room below the bound."""
        end = self.used + len(part)
        if self._room is None or end > len(self._room):
            size = min(self.most, max(64, 2 * end))
            columns = {name: tensor.new_empty(size, *tensor.shape[1:]) for name, tensor in vars(part).items()}
            grown = Part(**columns)
            if self._room is not None:
                _put(grown, slice(0, self.used), self._room[: self.used])
            self._room = grown
        _put(self._room, slice(self.used, end), part)
        self.used = end

    def replace(self, rows: Tensor, part: Part) -> None:
        """Put tokens in the places of others."""
        assert self._room is not None
        _put(self._room, rows, part)

    def content(self) -> Part | None:
        """What is there: a view."""
        return None if self._room is None else self._room[slice(0, self.used)]


def _put(room: Part, rows: Tensor | slice, part: Part) -> None:
    for name, tensor in vars(part).items():
        getattr(room, name)[rows] = tensor


class Reservoir:
    """At most so many tokens, each of those seen with the same chance (Vitter 1985, algorithm R).

        token i (from 0) is kept while i < most; after that it takes the place ⌊u (i + 1)⌋, u uniform on [0, 1), if
        that is below `most`

    Args:
        most: how many.
        seed: of the choice.
    """

    id = None

    def __init__(self, most: int, seed: int) -> None:
        self._rows = _Rows(most)
        self._random = torch.Generator().manual_seed(seed)
        self._seen = 0

    @property
    def kept(self) -> int:
        return self._rows.used

    def add(self, part: Part) -> None:
        fits = min(len(part), self._rows.most - self._rows.used)
        if fits:
            self._rows.append(part[slice(0, fits)])
        rest = part[slice(fits, None)]
        if len(rest):
            order = torch.arange(self._seen + fits, self._seen + len(part)) + 1
            drawn = torch.rand(len(rest), generator=self._random, dtype=torch.float64)
            place = (drawn * order).long()
            latest = {int(p): i for i, p in enumerate(place.tolist()) if p < self._rows.most}
            if latest:  # of several for one place the last one stays
                self._rows.replace(torch.tensor(list(latest)), rest[torch.tensor(list(latest.values()))])
        self._seen += len(part)

    def parts(self) -> Iterator[Part]:
        content = self._rows.content()
        return iter([] if content is None else [content.by_text()])


class Shards:
    """All tokens, in files of so many each; at most one file's worth in memory.

    Args:
        folder: where.
        size: tokens of a file.

    Attributes:
        id: of the record.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.id = new_id()
        self.sizes: list[int] = []
        self._rows = _Rows(size)

    @property
    def kept(self) -> int:
        return sum(self.sizes) + self._rows.used

    def add(self, part: Part) -> None:
        while len(part):
            fits = min(len(part), self.size - self._rows.used)
            self._rows.append(part[slice(0, fits)])
            part = part[slice(fits, None)]
            if self._rows.used == self.size:
                self.flush()

    def flush(self) -> None:
        """Write what is in memory.

        Raises:
            SaveError: the folder could not be written.
        """
        content = self._rows.content()
        if content is None or not self._rows.used:
            return
        save_files(self.folder, {shard_name(len(self.sizes)): shard_writer(content.by_text, self.id)})
        self.sizes.append(self._rows.used)
        self._rows.used = 0

    def parts(self) -> Iterator[Part]:
        from loramix.analysis.record.files import read_part

        written = [self.folder / shard_name(i) for i in range(len(self.sizes))]
        content = self._rows.content()
        rest = [] if content is None else [content.by_text()]
        return itertools.chain((read_part(path, self.id) for path in written), rest)


class Kept:
    """Parts that are there."""

    id = None

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.kept = sum(map(len, parts))

    def parts(self) -> Iterator[Part]:
        yield from self._parts


def new_id() -> str:
    """A record's, by which its files know that they belong together."""
    return uuid.uuid4().hex


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"tokens-{number:05d}.safetensors"


def shard_writer(part: Callable[[], Part], record: str) -> Callable[[Path], None]:
    """What writes a shard of the record with this id."""
    return lambda path: write_tensors(path, part().tensors(), record=record)
