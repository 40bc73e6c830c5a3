"""The text of tokens, also where a token is half a character.

N: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loramix.routing.parts import Part

HALF = "�"
"""What a decoder makes of bytes that are no whole character."""


def pieces_of(tokenizer: Any, part: Part) -> list[str]:
    """N pieces of text. Those of a run, tokens that follow each other in one text, add up to the run's text.

    Args:
        tokenizer: any of transformers'.
        part: the tokens, in the order of the texts.
    """
    found: list[str] = []
    starts = part.run_starts()
    for first, last in zip(starts, [*starts[1:], len(part)], strict=True):
        run = Pieces(tokenizer)
        found += [run.step(token) for token in part.token[first:last].tolist()]
        found[-1] += run.flush()
    return found


class Pieces:
    """The text of a run, token by token. The pieces add up to it: a character of several tokens is in the last one's.

    A token's piece is what it adds to the text of the few before it: decoding all of them would be quadratic.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # how many of them have given their text

    def step(self, token: int) -> str:
        """What the next token adds; "" for one that only begins a character."""
        self._ids.append(token)
        text = _decode(self.tokenizer, self._ids)
        if text.endswith(HALF) and len(self._ids) - self._known <= 4:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is left at the end: half a character."""
        return self._take(_decode(self.tokenizer, self._ids)) if self._known < len(self._ids) else ""

    def _take(self, text: str) -> str:
        piece = text[len(_decode(self.tokenizer, self._ids[: self._known])) :]
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return piece


def one_by_one(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token id on its own, with the space that some vocabularies mark it with."""
    found: dict[int, str] = {}
    for token in ids:
        if token >= 0:
            text = _decode(tokenizer, [token])
            marked = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
            found[token] = " " + text if marked and not text.startswith(" ") else text
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    kept = [token for token in ids if token >= 0]
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if kept else ""
