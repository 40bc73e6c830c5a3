"""Cutting text: tokens into windows, and texts into the passages that are evaluated.

S: tokens of a passage, the first of which is given, not predicted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from loramix.config.checks import require_integer
from loramix.errors import DataError
from loramix.experts.base_model import positions_of

LONGEST_WINDOW = 1024
"""Tokens of a window where neither the caller nor the base model sets a bound."""


class Window(NamedTuple):
    """Consecutive tokens of a text: the position of the first one, and the tokens with the start tokens in front."""

    first: int
    ids: list[int]


@dataclass(frozen=True)
class Passage:
    """A piece of text as tokens.

    Attributes:
        ids: S tokens.
        groups: for each token but the first, the group of text that it belongs to.
        bytes: for each token but the first, the number of bytes of text that it adds.
    """

    ids: list[int]
    groups: list[str]
    bytes: list[int]


def windows(ids: Sequence[int], size: int, *, start: Sequence[int] = (), overlap: int = 0) -> Iterator[Window]:
    """Cut the tokens of a text into windows of at most `size` tokens; the last one may be shorter.

    Args:
        ids: the tokens of the text.
        size: tokens of a window, those of `start` included.
        start: tokens in front of each window.
        overlap: so many tokens at the end of a window begin the next one too.
    """
    room = max(1, size - len(start))
    for first in range(0, len(ids) - overlap, max(1, room - overlap)):
        yield Window(first, [*start, *ids[first : first + room]])


def start_of(tokenizer: Any) -> list[int]:
    """The token in front of every text, as a list; empty where the tokenizer has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def window_size(config: Any, window: int | None = None) -> int:
    """The size of a window for a base model: as many tokens as it has positions, at most 1024, unless it is given.

    Args:
        config: the base model's.
        window: the size to check; None chooses.

    Raises:
        DataError: fewer than two tokens, or more than the base model has positions.
        ConfigurationError: not a whole number.
    """
    positions = positions_of(config)
    if window is None:
        return min(LONGEST_WINDOW, positions or LONGEST_WINDOW)
    remedy = "Use a window of at least 2." if positions is None else f"Use a window from 2 to {positions}."
    require_integer("window", window, at_least=None, remedy=remedy)
    if window < 2 or (positions is not None and window > positions):
        raise DataError(
            "A window has at least two tokens, and no more than the base model has positions.",
            received=f"window={window}" + ("" if positions is None else f" with {positions} positions"),
            remedy=remedy,
        )
    return window


def cut_passages(
    tokenizer: Any, texts: Iterable[tuple[str, str]], *, window: int, least: int = 2, limit: int | None = None
) -> Iterator[Passage]:
    """Cut texts into passages of at most `window` tokens, each with the start token in front where there is one.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: text and its group.
        window: tokens of a passage, the start token included.
        least: a shorter passage is left out.
        limit: at most so many passages of each group.

    Raises:
        DataError: a tokenizer that does not know where its tokens are in the text.
    """
    start = start_of(tokenizer)
    counts: defaultdict[str, int] = defaultdict(int)
    for text, group in texts:
        if limit is not None and counts[group] >= limit:
            continue
        ids, sizes = encode_with_sizes(tokenizer, text)
        for first, piece in windows(ids, window, start=start):
            if len(piece) < max(2, least) or (limit is not None and counts[group] >= limit):
                continue
            lengths = sizes[first : first + len(piece) - len(start)]
            yield Passage(piece, [group] * (len(piece) - 1), lengths if start else lengths[1:])
            counts[group] += 1


def encode_with_sizes(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a text, without special ones, and the number of bytes that each adds; they sum to the text's.

    Of a character of several tokens, all bytes count for the first token that reaches its end.

    Raises:
        DataError: a tokenizer that does not know where its tokens are in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "Bits per byte need a tokenizer that tells which bytes a token stands for.",
            received=f"a {type(tokenizer).__name__}, which is not a fast one",
            remedy="Save a tokenizer.json with AutoTokenizer.from_pretrained(…).save_pretrained(…), and use that.",
        )
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    sizes: list[int] = []
    reached = 0
    for _, end in encoding.offsets:
        sizes.append(len(text[reached:end].encode()) if end > reached else 0)
        reached = max(reached, end)
    return list(encoding.ids), sizes


def pad(texts: Sequence[list[int]], padding: int = 0) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Token lists as one tensor, padded on the right, and its mask: 1 at tokens, 0 at padding."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [padding] * (longest - len(text)) for text in texts])
    real = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return ids, real
