"""What the rounds of each strategy cost, in forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loramix.decoding.ngrams import NGramIndex
from support.generation import PADDING, generated, ids_with_padding, report_of
from support.tiny import tokens

LONG = 24


def test_only_rows_whose_draft_was_wrong_are_read_again(of_llama: Any) -> None:
    """A forward over both passes' rows for each token, and rows of the scaling pass alone after rejected drafts."""
    of_llama.set_global_scaling_weight(0.1)
    inputs = {"input_ids": ids_with_padding(), "attention_mask": PADDING, "max_new_tokens": LONG}
    expected = generated(of_llama, lockstep=False, **inputs)
    assert torch.equal(generated(of_llama, lockstep=True, **inputs), expected)
    of_llama.set_global_scaling_weight(1.0)
    rows, report = len(expected), report_of(of_llama)
    again = report.row_forwards - 2 * rows * report.tokens
    assert again == rows + report.drafts - report.accepted_drafts  # all at first, then those that were wrong
    assert again < rows * (report.forwards - report.tokens)  # in fewer rows than the batch has, at times


def test_a_round_ahead_costs_a_scaling_pass_for_each_token_and_one_mixture_pass(of_llama: Any) -> None:
    of_llama.set_global_scaling_weight(0.0)
    generated(of_llama, input_ids=tokens(1), max_new_tokens=LONG + 1, lockstep=5)
    report = report_of(of_llama)
    assert report.accepted == 1.0
    assert report.tokens == LONG
    assert dict(report.rounds) == {"speculative": LONG // 6}
    assert report.forwards == 7 * (LONG // 6)
    generated(of_llama, input_ids=tokens(1), max_new_tokens=LONG, lockstep=5)  # the last round reads nothing in vain
    assert report_of(of_llama).forwards == 7 * (LONG // 6 - 1) + 6
    of_llama.set_global_scaling_weight(1.0)


def test_what_the_text_has_said_costs_two_forwards_for_many_tokens(of_llama: Any) -> None:
    """A prompt that repeats itself, and a text that is made to repeat it: each draft is right."""
    words = tokens(1, 6)
    prompt, again = words.repeat(1, 2), words[0].tolist()

    def repeat(ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, again[ids.shape[1] % 6]] = 0.0
        return forced

    inputs = {"input_ids": prompt, "max_new_tokens": 17, "logits_processor": [repeat]}
    expected = generated(of_llama, lockstep=False, **inputs)
    assert torch.equal(generated(of_llama, lockstep="lookup", **inputs), expected)
    report = report_of(of_llama)
    assert report.accepted == 1.0
    assert dict(report.rounds) == {"prompt_lookup": 2}
    assert report.forwards == 4
    assert report.forwards_per_token == 0.25


def test_repeats_are_found_and_go_on() -> None:
    assert NGramIndex([1, 2, 3, 4]).drafts(3) == []
    text = NGramIndex([1, 2, 3, 4, 5, 1, 2])
    assert text.drafts(3) == []
    text.add(3)
    assert text.drafts(3) == [4, 5, 1]
    assert text.drafts(7) == [4, 5, 1, 2, 3, 4, 5]  # as if it went on so
    assert NGramIndex([7, 7, 7, 7]).drafts(3) == [7, 7, 7]
    assert NGramIndex([1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3]).drafts(1) == [9]  # the last time counts


def test_drafts_are_right_where_the_experts_add_little(model: Any) -> None:
    model.set_global_scaling_weight(0.0)
    generated(model, input_ids=tokens(2), max_new_tokens=LONG, lockstep=True)
    model.set_global_scaling_weight(1.0)
    assert report_of(model).accepted == 1.0
    assert report_of(model).forwards_per_token == pytest.approx(1 + 1 / (LONG - 1))
