"""How far the rows of a cache have come in their texts, through everything that happens to them.

B: rows. S: tokens of a forward. T: slots that the cache holds, padding among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from loramix.hooks import CacheFollower
from loramix.sessions import Request


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

    Attributes:
        places: of each row; None before its first token.
        real: (B, T), False at padding.
        finished: rows that `generate` only pads any more.
        call: the `generate` that says so.
    """

    def __init__(self, recorder: Follows, batch: int) -> None:
        self.recorder = recorder
        self.places: list[Place | None] = [None] * batch
        self.real = torch.zeros(batch, 0, dtype=torch.bool)
        self.finished = torch.zeros(batch, dtype=torch.bool)
        self.call: Request | None = None

    @property
    def batch(self) -> int:
        """B."""
        return len(self.places)

    def reordered(self, rows: Tensor) -> None:
        self._take(torch.arange(self.batch)[rows.detach().cpu()])

    def repeated(self, times: int) -> None:
        self._take(torch.arange(self.batch).repeat_interleave(times))

    def _take(self, rows: Tensor) -> None:
        self.recorder.commit()
        self.places = [self.places[row] for row in rows.tolist()]
        self.real, self.finished = self.real[rows], self.finished[rows]

    def cropped(self, tokens: int) -> None:
        if tokens > 0:
            self.recorder.take_back(self, tokens)

    def emptied(self) -> None:
        self.recorder.commit()
        self.places = [None] * self.batch
        self.real = self.real[:, :0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        """The copy goes on by itself: where both do, the text forks."""
        self.recorder.commit()
        other = Followed(self.recorder, self.batch)
        other.places, other.real, other.finished = list(self.places), self.real.clone(), self.finished.clone()
        return other


class Uncached:
    """The texts of a `generate` without a cache, which reads all of each text again for each token."""

    def __init__(self, call: Request) -> None:
        self.call = call
        self._texts: list[tuple[list[int], Place]] = []

    def meet(self, tokens: Tensor, real: Tensor, rows: Followed) -> Tensor:
        """Which tokens are new; rows stand where they were, by the tokens that they begin with."""
        new = real.clone()
        for row in range(len(tokens)):
            ids = tokens[row][real[row]].tolist()
            candidates = [*self._texts[row : row + 1], *self._texts]
            found = next((place for text, place in candidates if text and ids[: len(text)] == text), None)
            if found is not None:
                rows.places[row] = found
                new[row] &= real[row].cumsum(0) > found.length
        return new

    def keep(self, tokens: Tensor, real: Tensor, rows: Followed) -> None:
        """These are the texts now."""
        pairs = zip(tokens, real, rows.places, strict=True)
        self._texts = [(ids[mask].tolist(), cast(Place, place)) for ids, mask, place in pairs]
