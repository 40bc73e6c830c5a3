"""Numbers of texts, and positions in them, for the tokens of each forward.

B, S: rows and tokens of a forward.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from loramix.analysis.record.cache_rows import CacheRows, TextPosition
from loramix.analysis.record.header import Header


class TextNumbering:
    """Gives each recorded text a number, and each of its tokens a position.

    A row continues the text that it holds. Where that text has been continued by another row meanwhile, a new text
    forks from it, which goes into the header.

    Args:
        header: the record's.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._lengths: list[int] = []  # of each text

    def start(self, length: int = 0, parent: TextPosition | None = None) -> TextPosition:
        """A new text, whose first `length` tokens were read before the recording or belong to its parent."""
        number = len(self._lengths)
        self._lengths.append(length)
        if parent is not None:
            self.header.forks[number] = parent.sequence, parent.length
        return TextPosition(number, length)

    def shorten(self, sequence: int, tokens: int) -> None:
        """Take so many tokens off the end of a text."""
        self._lengths[sequence] -= tokens

    def number(self, rows: CacheRows, new: Bool[Tensor, "B S"], starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The text of each token, and its position there, (B, S) each; the rows advance.

        Args:
            rows: where the rows stand.
            new: True at the tokens to number.
            starts: (B, S), True where a text begins in a row that holds several; None where there is one a row.
        """
        if starts is None and bool(new.all()):
            return self._number_whole(rows, new)
        sequence, position = torch.zeros(new.shape, dtype=torch.long), torch.zeros(new.shape, dtype=torch.long)
        for row in range(len(new)):
            edges = [0] if starts is None else torch.nonzero(starts[row]).flatten().tolist()
            for first, last in zip(edges, [*edges[1:], new.shape[1]], strict=True):
                if first:
                    rows.places[row] = self.start()
                count = new[row, first:last].long().cumsum(0)
                place = self._advance(rows, row, int(count[-1]))
                sequence[row, first:last] = place.sequence
                position[row, first:last] = place.length + count - 1
        return sequence, position

    def _number_whole(self, rows: CacheRows, new: Tensor) -> tuple[Tensor, Tensor]:
        places = [self._advance(rows, row, new.shape[1]) for row in range(len(new))]
        sequence = torch.tensor([place.sequence for place in places])[:, None].expand(new.shape)
        first = torch.tensor([place.length for place in places])[:, None]
        return sequence, first + torch.arange(new.shape[1])

    def _advance(self, rows: CacheRows, row: int, added: int) -> TextPosition:
        """Where a row's new tokens begin; the row advances past them."""
        place = rows.places[row] or self.start()
        if added and self._lengths[place.sequence] != place.length:
            place = self.start(place.length, place)
        if added:
            self._lengths[place.sequence] += added
        rows.places[row] = TextPosition(place.sequence, place.length + added)
        return place
