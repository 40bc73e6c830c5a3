"""From text to token windows, and from logits to bits per byte.

B windows, S tokens of a window (its first is the start token), V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from loramix.demo import corpus

WINDOW = 256
"""Tokens of a window, the start token included."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts some text: `bits` of information for `bytes` of UTF-8 text."""

    bits: float = 0.0
    bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Bits for a byte of text; lower is better."""
        return self.bits / self.bytes

    def __add__(self, other: Score) -> Score:
        return Score(self.bits + other.bits, self.bytes + other.bytes)


@dataclass(frozen=True)
class Passage:
    """A window of text: its tokens, the start token in front, and the domain that each other token comes from."""

    ids: list[int]
    domains: list[str]


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
    found: list[list[int]] = []
    for text in texts:
        ids = encode(tokenizer, text)
        pieces = [ids[i : i + WINDOW - 1] for i in range(0, len(ids), WINDOW - 1)][:per_text]
        found += [[start_token(tokenizer), *piece] for piece in pieces if len(piece) >= least]
        if count is not None and len(found) >= count:
            return found[:count]
    return found


def heldout_passages(tokenizer: PreTrainedTokenizerFast, domain: str, count: int) -> list[Passage]:
    """`count` held-out windows of a domain, at most three of a document."""
    texts = (text for _, text in corpus.heldout_documents(domain))
    found = windows(tokenizer, texts, count=count, per_text=3)
    return [Passage(ids, [domain] * (len(ids) - 1)) for ids in found]


def switching_passages(
    tokenizer: PreTrainedTokenizerFast, count: int, *, held_out: bool = True, seed: int = 0, domains: int = 3
) -> list[Passage]:
    """`count` windows that switch domain in mid-sequence: pieces of several domains, as good as equally long.

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
        tokens = [(token, domain) for domain, text in pieces for token in encode(tokenizer, text)[:room]]
        ids, owners = (list(column) for column in zip(*tokens, strict=True))
        found.append(Passage([start_token(tokenizer), *ids], owners))
    return found


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a text of any length, without the start token."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def start_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that stands in front of every text."""
    token = tokenizer.bos_token_id
    assert isinstance(token, int)
    return token


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Int[Tensor, " V"]:
    """UTF-8 bytes of each token of a byte-level vocabulary, where a character stands for a byte; 0 for special ones."""
    special = set(tokenizer.all_special_ids)
    tokens: Sequence[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if i in special else len(token) for i, token in enumerate(tokens)])


def token_bits(logits: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S-1"]:
    """Bits of information of each token after the first: -log2 of the probability that the model gave it."""
    nats = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return nats / math.log(2)


@torch.no_grad()
def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, passages: Sequence[Passage], batch: int = 8
) -> dict[str, Score]:
    """Bits and bytes of the passages under the model, for each domain that occurs in them.

    The start token is given, not predicted.
    """
    lengths = token_bytes(tokenizer)
    scores: defaultdict[str, Score] = defaultdict(Score)
    was_training = model.training
    model.eval()
    for i in range(0, len(passages), batch):
        chosen = passages[i : i + batch]
        ids, _ = pad([passage.ids for passage in chosen])
        bits = token_bits(model(input_ids=ids, use_cache=False).logits, ids)
        for row, passage in enumerate(chosen):
            for domain in set(passage.domains):
                here = torch.tensor([d == domain for d in passage.domains])
                n = len(here)
                tokens = ids[row, 1 : n + 1][here]
                scores[domain] += Score(float(bits[row, :n][here].sum()), int(lengths[tokens].sum()))
    model.train(was_training)
    return dict(scores)


def total(scores: Iterable[Score]) -> Score:
    """The sum of the scores."""
    return sum(scores, Score())


def pad(texts: Sequence[list[int]]) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Windows as one tensor, padded on the right with token 0, and 1 where a token is real."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    real = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return ids, real


class Windows(Dataset[dict[str, list[int]]]):
    """Windows as a trainer takes them: rows with `input_ids`."""

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.texts[index]}


def causal_batch(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows with `input_ids` as a batch for a causal language model: padded, and padding is not learnt."""
    ids, real = pad([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}
