"""The demo's text as windows of tokens: to train on, and with the domain of each token to evaluate with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from loramix.demo import corpus
from loramix.evaluation import passages as evaluation
from loramix.evaluation.passages import Passage, pad

WINDOW = 256
"""Tokens of a window, the start token included."""


def windows(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    *,
    count: int | None = None,
    per_text: int | None = None,
    least: int = 64,
) -> list[list[int]]:
    """Texts cut into windows of `WINDOW` tokens, each with the start token in front.

    Args:
        tokenizer: the demo's tokenizer.
        texts: documents; a window never spans two.
        count: stop after so many windows (default: all).
        per_text: at most so many windows from the beginning of a text (default: all).
        least: a shorter rest at the end of a text is left out.
    """
    start, found = [start_token(tokenizer)], list[list[int]]()
    for text in texts:
        pieces = itertools.islice(evaluation.windows(encode(tokenizer, text), WINDOW, start=start), per_text)
        found += [ids for _, ids in pieces if len(ids) > least]
        if count is not None and len(found) >= count:
            return found[:count]
    return found


def heldout_passages(tokenizer: PreTrainedTokenizerFast, domain: str, count: int) -> list[Passage]:
    """`count` held-out windows of a domain, at most three of a document."""
    texts = ([(text, domain)] for _, text in corpus.heldout_documents(domain))
    cut = (itertools.islice(evaluation.cut_passages(tokenizer, one, window=WINDOW), 3) for one in texts)
    found = (passage for of_text in cut for passage in of_text if len(passage.groups) >= 64)
    return list(itertools.islice(found, count))


def switching_passages(
    tokenizer: PreTrainedTokenizerFast, count: int, *, held_out: bool = True, seed: int = 0, domains: int = 3
) -> list[Passage]:
    """`count` windows that switch domain within a sequence: pieces of several domains, about equally long.

    Args:
        tokenizer: the demo's tokenizer.
        count: how many windows.
        held_out: made of held-out text, otherwise of training text.
        seed: chooses the pieces.
        domains: how many a window has, each once.
    """
    room = (WINDOW - 1) // domains
    found: list[Passage] = []
    for pieces in corpus.switching_pieces(count, held_out=held_out, seed=seed, domains=domains):
        window = Passage([start_token(tokenizer)], [], [])
        for domain, text in pieces:
            ids, sizes = evaluation.encode_with_sizes(tokenizer, text)
            window.ids.extend(ids[:room])
            window.groups.extend([domain] * len(ids[:room]))
            window.bytes.extend(sizes[:room])
        found.append(window)
    return found


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a text of any length, without the start token."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def start_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that stands in front of every text."""
    token = tokenizer.bos_token_id
    assert isinstance(token, int)
    return token


class Windows(Dataset[dict[str, list[int]]]):
    """Windows as a data set for trainers: rows with `input_ids`."""

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.texts[index]}


def causal_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows with `input_ids` as a batch for a causal language model; padding has no label."""
    ids, real = pad([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}
