"""Bits per byte, and the windows that it is measured on."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loramix.demo.text import (
    WINDOW,
    Passage,
    Score,
    causal_batch,
    encode,
    heldout_passages,
    measure,
    start_token,
    switching_passages,
    token_bits,
    token_bytes,
    windows,
)

TEXTS = ["def f(x):\n    return x == 12 # é 😀\n", "Question: Ada has 34 apples.\n"]


class Uniform(torch.nn.Module):
    """A language model that knows nothing: every token is as likely as any other."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))


def passages(tokenizer: PreTrainedTokenizerFast) -> list[Passage]:
    rows = [[start_token(tokenizer), *encode(tokenizer, text)] for text in TEXTS]
    return [Passage(ids, [domain] * (len(ids) - 1)) for ids, domain in zip(rows, ("code", "math"), strict=True)]


def test_tokens_give_the_text_back(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        assert demo_tokenizer.decode(encode(demo_tokenizer, text)) == text


def test_the_start_token_is_put_in_front_for_users_too(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    assert demo_tokenizer(TEXTS[0]).input_ids == [start_token(demo_tokenizer), *encode(demo_tokenizer, TEXTS[0])]


def test_digits_are_tokens_of_their_own(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    assert [demo_tokenizer.decode([token]) for token in encode(demo_tokenizer, "2026")] == list("2026")


def test_token_bytes_add_up_to_the_text(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = token_bytes(demo_tokenizer)
    for text in TEXTS:
        assert int(lengths[encode(demo_tokenizer, text)].sum()) == len(text.encode())
    assert int(lengths[start_token(demo_tokenizer)]) == 0


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = Uniform(len(demo_tokenizer))
    scores = measure(model, demo_tokenizer, passages(demo_tokenizer))
    for text, domain in zip(TEXTS, ("code", "math"), strict=True):
        tokens = len(encode(demo_tokenizer, text))
        expected = math.log2(len(demo_tokenizer)) * tokens / len(text.encode())
        assert scores[domain].bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_bits_of_a_known_distribution() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1.0, 1.0, 1.0]]]).log()
    ids = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(token_bits(logits, ids), torch.tensor([[2.0, 3.0]]))


def test_the_batch_does_not_change_the_score(demo_tokenizer: PreTrainedTokenizerFast, demo_base: Any) -> None:
    together = measure(demo_base, demo_tokenizer, passages(demo_tokenizer), batch=2)
    alone = measure(demo_base, demo_tokenizer, passages(demo_tokenizer), batch=1)
    for domain, score in together.items():
        assert score.bits == pytest.approx(alone[domain].bits, rel=1e-5)


def test_scores_add_like_texts() -> None:
    assert (Score(8.0, 4) + Score(4.0, 8)).bits_per_byte == 1.0


def test_windows_cut_a_text_without_loss(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    text = TEXTS[1] * 60
    found = windows(demo_tokenizer, [text], least=1)
    assert all(ids[0] == start_token(demo_tokenizer) and len(ids) <= WINDOW for ids in found)
    assert demo_tokenizer.decode([token for ids in found for token in ids[1:]]) == text


def test_windows_stop_at_the_count_and_take_a_share_of_each_text(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    long = TEXTS[1] * 200
    assert len(windows(demo_tokenizer, [long, long, long], count=5, per_text=2)) == 5
    assert len(windows(demo_tokenizer, [long], per_text=2)) == 2


def test_a_switching_passage_knows_its_domains(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    for passage in switching_passages(demo_tokenizer, 12):
        assert len(passage.domains) == len(passage.ids) - 1 <= WINDOW - 1
        pieces = [len(list(run)) for _, run in itertools.groupby(passage.domains)]
        assert len(set(passage.domains)) == len(pieces) == 3
        assert min(pieces) >= 60


def test_a_domain_passage_has_one_domain(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    (passage,) = heldout_passages(demo_tokenizer, "prose", 1)
    assert set(passage.domains) == {"prose"}


def test_padding_is_not_learnt() -> None:
    batch = causal_batch([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
