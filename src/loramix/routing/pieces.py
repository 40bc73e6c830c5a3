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
        found += _run(tokenizer, part.token[first:last].tolist())
    return found


def _run(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's piece is what it adds to the text of the few before it: decoding all of them would be quadratic."""
    found: list[str] = []
    before = shown = 0  # tokens whose text is known, and from where they are decoded again
    for i in range(len(ids)):
        known = _decode(tokenizer, ids[before:shown])
        text = _decode(tokenizer, ids[before : i + 1])
        if text.endswith(HALF) and i + 1 < len(ids) and i - shown < 4:
            found.append("")
            continue
        found.append(text[len(known) :])
        before, shown = shown, i + 1
    return found


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
