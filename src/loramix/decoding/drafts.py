"""Several tokens read ahead of what is chosen, and where they may come from without a model: the text itself.

B: batch. k: drafts. V: vocabulary. L: adapted layers. E: experts.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

GRAM = 3  # tokens that must stand before for a text to be said to repeat


class Window:
    """Drafts that the mixture pass has read already: each is served when it is chosen, the rest is void when not.

    Args:
        drafts: the tokens that were read after the one that is known, in the order of the text.
        out: what the model returned, with logits (B, 1 + k, V).
        scalings: of the known token and of each draft, as the router made them.
        outcomes: where to say whether a draft was right.
        settings: what all was read with.
    """

    def __init__(
        self,
        drafts: Int[Tensor, "B k"],
        out: Any,
        scalings: Float[Tensor, "B 1+k #L E"],
        outcomes: deque[bool],
        settings: tuple[object, ...],
    ) -> None:
        self._drafts, self._out, self._logits, self._scalings = drafts, out, out.logits, scalings
        self.outcomes, self.settings = outcomes, settings
        self._next = 0  # of the tokens that were read

    @property
    def draft(self) -> Int[Tensor, " B"]:
        """The next one."""
        return self._drafts[:, self._next - 1]

    @property
    def is_used_up(self) -> bool:
        """Whether no draft is left to compare a token with."""
        return self._next > self._drafts.shape[1]

    def serve(self) -> tuple[Any, Float[Tensor, "B 1 #L E"]]:
        """What the model returns for the next token, the known one first, and its scalings."""
        place = slice(self._next, self._next + 1)
        self._next += 1
        out = copy.copy(self._out)
        out.logits = self._logits[:, place]
        return out, self._scalings[:, place]


class Repeats:
    """Where a text went on, the last time that it said what it says now (prompt lookup decoding).

    Args:
        text: the token ids so far.
    """

    def __init__(self, text: Iterable[int]) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place after the last occurrence of each run of tokens
        for token in text:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with this token."""
        if len(self._text) >= GRAM:
            self._after[tuple(self._text[-GRAM:])] = len(self._text)
        self._text.append(token)

    def drafts(self, count: int) -> list[int]:
        """What would follow if the text repeated itself: `count` tokens, or none where it says something new."""
        place = self._after.get(tuple(self._text[-GRAM:]))
        if place is None:
            return []
        again = self._text[place : place + count]  # the text up to here: from there on it would repeat that
        period = len(again)
        return [again[i % period] for i in range(count)]
