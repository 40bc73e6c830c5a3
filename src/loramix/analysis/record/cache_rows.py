"""Which texts the rows of a cache hold, and up to which token, through everything that happens to the cache.

B: rows. S: tokens of a forward. T: slots that the cache holds, padding among them.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from loramix.decoding.requests import Request
from loramix.passes.hooks import CacheFollower


class TextPosition(NamedTuple):
    """How far a row has read: the number of its text, and how many of the text's tokens."""

    sequence: int
    length: int


@runtime_checkable
class RowsObserver(Protocol):
    """Observes the tokens that the rows of a cache gain and lose."""

    def commit(self) -> None:
        """The tokens of the last forward can no longer be taken back."""

    def take_back(self, rows: CacheRows, tokens: int) -> None:
        """So many slots were removed at the end of the rows."""


class CacheRows(CacheFollower):
    """How far the rows of a cache, or of a forward without one, have read.

    It holds its observer weakly: copies of a cache may outlive a record.

    Attributes:
        places: where each row stands; None before its first token.
        real: (B, T), False at padding.
    """

    def __init__(self, observer: RowsObserver | None, batch: int) -> None:
        self._observer = weakref.ref(observer) if observer is not None else lambda: None
        self.places: list[TextPosition | None] = [None] * batch
        self.real = torch.zeros(batch, 0, dtype=torch.bool)

    @property
    def observer(self) -> RowsObserver | None:
        """The observer; None once it is gone."""
        return self._observer()

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
        observer = self.observer
        if observer is not None:
            observer.commit()

    def cropped(self, tokens: int) -> None:
        observer = self.observer
        if tokens > 0 and observer is not None:
            observer.take_back(self, tokens)

    def emptied(self) -> None:
        self._commit()
        self.places = [None] * self.batch
        self.real = self.real[:, :0]

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheRows:
        """The copy is continued independently: if both are continued, the text forks."""
        self._commit()
        other = CacheRows(self.observer, self.batch)
        other.places, other.real = list(self.places), self.real.clone()
        return other


class RereadTexts:
    """The texts of a `generate` without a cache, which reads each whole text again for each token.

    Without it each of these forwards would be recorded as new texts, and every token as often as it was read.
    """

    def __init__(self, call: Request) -> None:
        self.call = call
        self._texts: list[tuple[Tensor, TextPosition]] = []

    def find_new(self, tokens: Tensor, real: Tensor, rows: CacheRows) -> Tensor:
        """(B, S), True at tokens that were not read before; each row is set to the text that it begins with."""
        new = real.clone()
        for row in range(len(tokens)):
            ids = tokens[row][real[row]]
            candidates = [*self._texts[row : row + 1], *self._texts]
            found = next((place for text, place in candidates if torch.equal(ids[: len(text)], text)), None)
            if found is not None:
                rows.places[row] = found
                new[row] &= real[row].cumsum(0) > found.length
        return new

    def remember(self, tokens: Tensor, real: Tensor, rows: CacheRows) -> None:
        """Remember the texts of this forward, without the padding that follows a finished text."""
        several = zip(tokens, real, rows.places, strict=True)
        self._texts = [(ids[mask][: place.length], place) for ids, mask, place in several if place]
