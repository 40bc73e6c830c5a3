"""Rows of text as a data set for trainers: plain text as tokens, in pieces of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loramix.errors import DataError
from loramix.evaluation.passages import windows
from loramix.training.data import EXPERT, Row


def pieces(row: Row, tokenizer: Any, size: int | None) -> list[list[int]]:
    """A row's tokens for training.

    Plain text gets the end token, and is cut into pieces of `size` tokens. A piece begins with the last token of the
    one before, so that every token but the first is predicted once. A conversation or a completion is one piece, and
    is truncated to `size` tokens.

    Args:
        row: the text.
        tokenizer: of the base model.
        size: at least 2; None cuts nothing.
    """
    ids: list[int] = tokenizer(row.as_text(tokenizer), verbose=False)["input_ids"]
    if "text" not in row.content:
        return [ids[:size]]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if size is None:
        return [ids]
    return [window.ids for window in windows(ids, size, overlap=1)]


def to_dataset(rows: Sequence[Row], tokenizer: Any, size: int | None, *, labels: bool = False) -> Any:
    """A data set for TRL's trainers: plain text as tokens, in `pieces`; the other formats unchanged.

    Args:
        rows: rows of one format.
        tokenizer: the base model's.
        size: the most tokens of a piece.
        labels: whether `expert` stays a column, if any row has it.

    Raises:
        DataError: no text is long enough to predict a token.
    """
    import datasets  # pyright: ignore[reportMissingTypeStubs]

    def items() -> Iterator[dict[str, Any]]:
        for row in rows:
            label = {EXPERT: row.expert} if labelled else {}
            if "text" not in row.content:
                yield row.content | label
            else:
                yield from ({"input_ids": piece} | label for piece in pieces(row, tokenizer, size) if len(piece) > 1)

    labelled = labels and any(row.expert is not None for row in rows)
    found = list(items())
    if not found:
        raise DataError(
            "A text to train on has at least two tokens: one to read, one to predict.",
            received=f"{len(rows)} texts of a single token",
            remedy="Give longer texts.",
        )
    return datasets.Dataset.from_list(found)
