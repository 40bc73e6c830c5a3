"""How far the rows of a cache have come in their texts, through everything that happens to them.

B: rows. S: tokens of a forward. T: slots that the cache holds, padding among them.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from loramix.decoding.requests import Request
from loramix.passes.hooks import CacheFollower


class Place(NamedTuple):
    """How far a row has come: the number of its text, and how many of its tokens have been read."""

    sequence: int
    length: int


@runtime_checkable
class Follows(Protocol):
    """Who wants to know."""

    def commit(self) -> None:
        """What was read can not be taken back any more."""

    def take_back(self, rows: Followed, tokens: int) -> None:
        """So many slots at the end of the rows are gone."""


class Followed(CacheFollower):
    """How far the rows of a cache, or of a forward without one, have come.

    It keeps nobody alive: copies of a cache outlive a record.

    Attributes:
        places: of each row; None before its first token.
        real: (B, T), False at padding.
    """

    def __init__(self, recorder: Follows | None, batch: int) -> None:
        self._recorder = weakref.ref(recorder) if recorder is not None else lambda: None
        self.places: list[Place | None] = [None] * batch
        self.real = torch.zeros(batch, 0, dtype=torch.bool)

    @property
    def recorder(self) -> Follows | None:
        """Who wants to know; None once nobody does."""
        return self._recorder()

    @property
    def batch(self) -> int:
        """B."""
        return len(self.places)

    def reordered(self, rows: Tensor) -> None:
        self._take(torch.arange(self.batch)[rows.detach().cpu()])

    def repeated(self, times: int) -> None:
        self._take(torch.arange(self.batch).repeat_interleave(times))

    def _take(self, rows: Tensor) -> None:
        self._commit()
        self.places = [self.places[row] for row in rows.tolist()]
        self.real = self.real[rows]

    def _commit(self) -> None:
        recorder = self.recorder
        if recorder is not None:
            recorder.commit()

    def cropped(self, tokens: int) -> None:
        recorder = self.recorder
        if tokens > 0 and recorder is not None:
            recorder.take_back(self, tokens)

    def emptied(self) -> None:
        self._commit()
        self.places = [None] * self.batch
        self.real = self.real[:, :0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        """The copy goes on by itself: where both do, the text forks."""
        self._commit()
        other = Followed(self.recorder, self.batch)
        other.places, other.real = list(self.places), self.real.clone()
        return other


class Uncached:
    """The texts of a `generate` without a cache, which reads all of each text again for each token."""

    def __init__(self, call: Request) -> None:
        self.call = call
        self._texts: list[tuple[Tensor, Place]] = []

    def meet(self, tokens: Tensor, real: Tensor, rows: Followed) -> Tensor:
        """(B, S), which tokens are new; rows stand where they were, by the tokens that they begin with."""
        new = real.clone()
        for row in range(len(tokens)):
            ids = tokens[row][real[row]]
            candidates = [*self._texts[row : row + 1], *self._texts]
            found = next((place for text, place in candidates if torch.equal(ids[: len(text)], text)), None)
            if found is not None:
                rows.places[row] = found
                new[row] &= real[row].cumsum(0) > found.length
        return new

    def keep(self, tokens: Tensor, real: Tensor, rows: Followed) -> None:
        """These are the texts now: what a row holds beyond its text is what it is padded with."""
        several = zip(tokens, real, rows.places, strict=True)
        self._texts = [(ids[mask][: place.length], place) for ids, mask, place in several if place]
