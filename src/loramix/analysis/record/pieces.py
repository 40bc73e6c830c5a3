"""The text of tokens, also where a token is half a character.

N: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loramix.analysis.record.parts import Part
from loramix.errors import RoutingError

HALF = "�"
"""What a decoder makes of bytes that are no whole character."""
CONTEXT = 8
"""Tokens before a run that its first one may need to be read: for a space at its beginning."""


def require_tokenizer(tokenizer: Any) -> None:
    """Raises RoutingError: what is no tokenizer; better known before anything is recorded."""
    if not callable(getattr(tokenizer, "decode", None)):
        raise RoutingError(
            "The text of tokens is read by a tokenizer of transformers'.",
            received=f"{tokenizer!r}"[:200],
            remedy="pass AutoTokenizer.from_pretrained(…), the mixture's; a record also does without one",
        )


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

    def read(self, ids: Sequence[int]) -> str:
        """The text of tokens that stand before the run; half a character at their end is the run's to finish."""
        text = whole = _decode(self.tokenizer, ids)
        half = 0
        while text.endswith(HALF) and half < min(3, len(ids)):
            half += 1
            text = _decode(self.tokenizer, ids[: len(ids) - half])
        if text.endswith(HALF):  # bytes that begin no character
            text, half = whole, 0
        self._ids = list(ids[max(0, len(ids) - half - CONTEXT) :])
        self._known = len(self._ids) - half
        return text

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
