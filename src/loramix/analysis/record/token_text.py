"""The text of tokens, also where a character consists of several tokens.

N: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loramix.analysis.record.part import Part
from loramix.errors import RoutingError

REPLACEMENT = "�"
"""A decoder's text for bytes that are no whole character."""
CONTEXT = 8
"""Tokens before a run that are decoded with its first one: some tokenizers strip the space of a first token."""


def require_tokenizer(tokenizer: Any) -> None:
    """Raises RoutingError: it is not a tokenizer. Checked before anything is recorded."""
    if not callable(getattr(tokenizer, "decode", None)):
        raise RoutingError(
            "The text of tokens is read by a tokenizer of transformers'.",
            received=f"{tokenizer!r}"[:200],
            remedy="pass the mixture's AutoTokenizer.from_pretrained(…), or None: a record needs no tokenizer",
        )


def require_same_text(tokenizer: Any, vocabulary: Mapping[int, str]) -> None:
    """Raises RoutingError: the tokenizer reads a token of the vocabulary as another text."""
    read = token_texts(tokenizer, vocabulary)
    wrong = next((token for token in vocabulary if read.get(token) != vocabulary[token]), None)
    if wrong is not None:
        raise RoutingError(
            "A record's text is read with the tokenizer of its mixture.",
            received=f"one to which token {wrong} is {read.get(wrong)!r}, where the record has {vocabulary[wrong]!r}",
            remedy="pass the tokenizer of the mixture that was recorded, or none",
        )


def pieces_of(tokenizer: Any, part: Part) -> list[str]:
    """The text of each of N tokens. In a run of consecutive tokens of one text, the pieces add up to the run's text.

    Args:
        tokenizer: any of transformers'.
        part: the tokens, sorted by text and position.
    """
    found: list[str] = []
    starts = part.run_starts()
    for first, last in zip(starts, [*starts[1:], len(part)], strict=True):
        run = IncrementalDecoder(tokenizer)
        found += [run.step(token) for token in part.token[first:last].tolist()]
        found[-1] += run.flush()
    return found


class IncrementalDecoder:
    """Decodes a run token by token. The pieces add up to its text: a character of several tokens is in the last one's.

    A token's piece is what it adds to the text of the few tokens before it: decoding the whole run for each token would
    be quadratic.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._decoded = 0  # how many of them have given their text

    def read(self, ids: Sequence[int]) -> str:
        """Start with a prompt and return its text, without a character that it leaves incomplete."""
        text = whole = _decode(self.tokenizer, ids)
        open = 0
        while text.endswith(REPLACEMENT) and open < min(3, len(ids)):
            open += 1
            text = _decode(self.tokenizer, ids[: len(ids) - open])
        if text.endswith(REPLACEMENT):  # bytes that begin no character
            text, open = whole, 0
        self._ids = list(ids[max(0, len(ids) - open - CONTEXT) :])
        self._decoded = len(self._ids) - open
        return text

    def step(self, token: int) -> str:
        """The text that the next token adds; "" while a character is incomplete."""
        self._ids.append(token)
        text = _decode(self.tokenizer, self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._decoded <= 4:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """The text of an incomplete character at the end."""
        return self._take(_decode(self.tokenizer, self._ids)) if self._decoded < len(self._ids) else ""

    def _take(self, text: str) -> str:
        piece = text[len(_decode(self.tokenizer, self._ids[: self._decoded])) :]
        self._ids = self._ids[self._decoded :]
        self._decoded = len(self._ids)
        return piece


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token id on its own, with the space that some vocabularies mark it with."""
    found: dict[int, str] = {}
    for token in ids:
        if token >= 0:
            text = _decode(tokenizer, [token])
            marked = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")
            found[token] = " " + text if marked and not text.startswith(" ") else text
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    known = [token for token in ids if token >= 0]
    return str(tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if known else ""
