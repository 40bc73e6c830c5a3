"""Where a record's tokens are kept while they are recorded: a bounded sample in memory, or files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loramix.analysis.record.part import Part
from loramix.analysis.record.shards import new_id, read_shard, shard_name, shard_writer
from loramix.files.atomic import save_files


@runtime_checkable
class Source(Protocol):
    """Where tokens are read from; in files they have an id."""

    @property
    def kept(self) -> int: ...
    @property
    def id(self) -> str | None: ...
    def parts(self) -> Iterator[Part]:
        """The tokens at the time of the call, whatever is added while they are read."""
        ...


@runtime_checkable
class Store(Source, Protocol):
    """Where tokens are added."""

    def add(self, part: Part) -> None: ...


class MemorySource:
    """Tokens in memory."""

    id = None

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.kept = sum(map(len, parts))

    def parts(self) -> Iterator[Part]:
        yield from self._parts


class _Buffer:
    """Tokens in memory up to a bound; its room doubles, so that adding a token costs constant time on average."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._room: Part | None = None

    def append(self, part: Part) -> None:
        """Add tokens; they must fit below the bound."""
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
        """The tokens, as a view."""
        return None if self._room is None else self._room[slice(0, self.used)]


def _put(room: Part, rows: Tensor | slice, part: Part) -> None:
    for name, tensor in vars(part).items():
        getattr(room, name)[rows] = tensor


class Reservoir:
    """A uniform sample of bounded size: each token seen is in it with the same probability.

        token i (from 0) is kept while i < most; after that it takes the place ⌊u (i + 1)⌋, u uniform on [0, 1), if
        that is below `most`

    Source: Vitter 1985, algorithm R.

    Args:
        most: the number of tokens to keep.
        seed: of the sample.
    """

    id = None

    def __init__(self, most: int, seed: int) -> None:
        self._buffer = _Buffer(most)
        self._random = torch.Generator().manual_seed(seed)
        self._seen = 0

    @property
    def kept(self) -> int:
        return self._buffer.used

    def add(self, part: Part) -> None:
        fits = min(len(part), self._buffer.most - self._buffer.used)
        if fits:
            self._buffer.append(part[slice(0, fits)])
        rest = part[slice(fits, None)]
        if len(rest):
            order = torch.arange(self._seen + fits, self._seen + len(part)) + 1
            drawn = torch.rand(len(rest), generator=self._random, dtype=torch.float64)
            place = (drawn * order).long()
            latest = {int(p): i for i, p in enumerate(place.tolist()) if p < self._buffer.most}
            if latest:  # where several tokens draw one place, the last one keeps it
                self._buffer.replace(torch.tensor(list(latest)), rest[torch.tensor(list(latest.values()))])
        self._seen += len(part)

    def parts(self) -> Iterator[Part]:
        content = self._buffer.content()
        return iter([] if content is None else [content.by_text()])


class SpillStore:
    """All tokens, in files of `size` tokens each; at most one file's worth of them in memory.

    Args:
        folder: where the files go.
        size: the number of tokens in a file.

    Attributes:
        id: the record's.
        sizes: the number of tokens in each file so far.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.id = new_id()
        self.sizes: list[int] = []
        self._buffer = _Buffer(size)

    @property
    def kept(self) -> int:
        return sum(self.sizes) + self._buffer.used

    def add(self, part: Part) -> None:
        while len(part):
            fits = min(len(part), self.size - self._buffer.used)
            self._buffer.append(part[slice(0, fits)])
            part = part[slice(fits, None)]
            if self._buffer.used == self.size:
                self.flush()

    def flush(self) -> None:
        """Write the tokens that are in memory.

        Raises:
            SaveError: the folder could not be written.
        """
        content = self._buffer.content()
        if content is None or not self._buffer.used:
            return
        save_files(self.folder, {shard_name(len(self.sizes)): shard_writer(content.by_text, self.id)})
        self.sizes.append(self._buffer.used)
        self._buffer.used = 0

    def parts(self) -> Iterator[Part]:
        written = [self.folder / shard_name(i) for i in range(len(self.sizes))]
        content = self._buffer.content()
        rest = [] if content is None else [content.by_text()]
        return itertools.chain((read_shard(path, self.id) for path in written), rest)
