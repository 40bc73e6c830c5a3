"""Prompt lookup: drafts from the text itself, found by its last n-gram."""

from __future__ import annotations

from collections.abc import Iterable

GRAM = 3  # tokens that must have occurred before, in this order


class NGramIndex:
    """The tokens of a text so far, and where each n-gram of it occurred last.

    Args:
        tokens: the text's ids.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its last occurrence
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        if len(self._tokens) >= GRAM:
            self._after[tuple(self._tokens[-GRAM:])] = len(self._tokens)
        self._tokens.append(token)

    def drafts(self, count: int) -> list[int]:
        """The `count` tokens that followed the last n-gram at its previous occurrence; none if there is none.

        If fewer tokens followed, the text is assumed to repeat with that period.
        """
        place = self._after.get(tuple(self._tokens[-GRAM:]))
        if place is None:
            return []
        followed = self._tokens[place : place + count]
        return [followed[i % len(followed)] for i in range(count)]
