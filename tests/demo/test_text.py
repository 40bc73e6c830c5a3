"""Bits per byte, and the windows that it is measured on."""

from __future__ import annotations

import itertools

from transformers import PreTrainedTokenizerFast

from loramix.demo.text import (
    WINDOW,
    causal_batch,
    encode,
    heldout_passages,
    start_token,
    switching_passages,
    windows,
)
from loramix.evaluation.passages import cut_passages

TEXTS = ["def f(x):\n    return x == 12 # é 😀\n", "Question: Ada has 34 apples.\n"]


def test_tokens_give_the_text_back(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        assert demo_tokenizer.decode(encode(demo_tokenizer, text)) == text


def test_the_start_token_is_put_in_front_for_users_too(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    assert demo_tokenizer(TEXTS[0]).input_ids == [start_token(demo_tokenizer), *encode(demo_tokenizer, TEXTS[0])]


def test_digits_are_tokens_of_their_own(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    assert [demo_tokenizer.decode([token]) for token in encode(demo_tokenizer, "2026")] == list("2026")


def test_the_bytes_of_a_passage_add_up_to_its_text(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        (found,) = cut_passages(demo_tokenizer, [(text, "code")], window=WINDOW)
        assert found.ids == [start_token(demo_tokenizer), *encode(demo_tokenizer, text)]
        assert sum(found.bytes) == len(text.encode())


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
    for window in switching_passages(demo_tokenizer, 12):
        assert len(window.groups) == len(window.ids) - 1 <= WINDOW - 1
        pieces = [len(list(run)) for _, run in itertools.groupby(window.groups)]
        assert len(set(window.groups)) == len(pieces) == 3
        assert min(pieces) >= 60


def test_a_domain_passage_has_one_domain(demo_tokenizer: PreTrainedTokenizerFast) -> None:
    (only,) = heldout_passages(demo_tokenizer, "prose", 1)
    assert set(only.groups) == {"prose"}


def test_padding_is_not_learnt() -> None:
    batch = causal_batch([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
