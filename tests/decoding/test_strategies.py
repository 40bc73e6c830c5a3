"""What the rounds of each strategy cost, in forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from loramix.decoding.forwards import Forwards
from loramix.decoding.ngrams import NGramIndex
from loramix.decoding.state import DecodingState, Step
from loramix.decoding.strategies import DraftingStrategy
from loramix.decoding.strategies.base import Round
from loramix.decoding.window import Window
from loramix.passes.state import state_of
from support.generation import PADDING, forced, generated, ids_with_padding, random_text, report_of
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


@dataclass(frozen=True)
class Constant(DraftingStrategy):
    """Drafts one and the same token."""

    token: int = 0
    name: ClassVar[str] = "constant"
    drafter: ClassVar[str] = "constant"

    @property
    def forwards(self) -> tuple[int, int]:
        return 0, 2

    @property
    def row_forwards_at_risk(self) -> int:
        return 2

    def tokens(self, acceptance: float) -> float:
        return 1 + acceptance

    def is_ready(self, state: DecodingState) -> bool:
        return state.draft_limit(1) > 0

    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        drafts = torch.full_like(step.ids, self.token)
        output = forwards.route(forwards.scale(*step.followed_by(drafts), state.length), step.inputs)
        out = forwards.mix(step, drafts, output.routing)
        return Round(forwards.take(Window(drafts, out, output.activated, self.drafter, forwards.mixture.settings())))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_strategy_is_one_class(batch: int, of_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, and among those that are weighed: tried within the allowance, kept if its drafts are right."""
    for text, right in ((forced(lambda n: 3), True), (forced(random_text(80).__getitem__), False)):
        inputs = {"input_ids": tokens(batch), "max_new_tokens": 60, "logits_processor": [text]}
        expected = generated(of_llama, lockstep=False, **inputs)
        assert torch.equal(generated(of_llama, lockstep=Constant(3), **inputs), expected)
        assert report_of(of_llama).rounds["constant"] >= 29
        assert report_of(of_llama).accepted == (1.0 if right else 0.0)
        monkeypatch.setattr("loramix.decoding.scheduler.DRAFTING", (Constant(3),))
        state_of(of_llama).measurements.clear()
        assert torch.equal(generated(of_llama, **inputs), expected)
        report = report_of(of_llama)
        assert report.rounds["constant"] > 1 if right else report.rounds["constant"] == 1
        assert right or report.row_forwards <= 2 * batch * report.tokens * 1.03
