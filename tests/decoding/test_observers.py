"""Hooks, the log, records and streamers see of drafted tokens what they see of two passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from loramix.passes.hooks import RoutingHook
from loramix.passes.state import attach
from support.generation import generated, report_of
from support.tiny import tokens

LONG = 24


def test_a_hook_that_comes_meanwhile_sees_each_token_from_then_on(of_llama: Any) -> None:
    class Seen(RoutingHook):
        def __init__(self) -> None:
            self.tokens = 0

        def routed(self, output: Any) -> None:
            self.tokens += output.final.shape[1]

    found = []
    for lockstep in (False, True, 5):
        hook, detach = Seen(), []

        def put_on(ids: Tensor, scores: Tensor, hook: Seen = hook, detach: list[Any] = detach) -> Tensor:
            if ids.shape[1] == 12:
                detach.append(attach(of_llama, hook))
            return scores

        of_llama.set_global_scaling_weight(0.0)
        generated(of_llama, input_ids=tokens(1), max_new_tokens=12, logits_processor=[put_on], lockstep=lockstep)
        of_llama.set_global_scaling_weight(1.0)
        detach[0]()
        found.append(hook.tokens)
    assert found == [8, 8, 8]


def test_the_scalings_of_tokens_that_were_read_ahead_are_served_one_by_one(of_llama: Any) -> None:
    seen: list[list[Tensor]] = []
    for lockstep in (False, 5):
        latest: list[Tensor] = []

        def look(ids: Tensor, scores: Tensor, latest: list[Tensor] = latest) -> Tensor:
            latest.append(of_llama.get_latest_scalings()[:, -1])
            return scores

        generated(of_llama, input_ids=tokens(2), max_new_tokens=12, logits_processor=[look], lockstep=lockstep)
        seen.append(latest)
    for one, other in zip(*seen, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_tokens_are_not_read_ahead_while_somebody_watches(of_llama: Any) -> None:
    of_llama.enable_scalings_logging()
    generated(of_llama, input_ids=tokens(1), max_new_tokens=12, lockstep=5)
    of_llama.disable_scalings_logging()
    of_llama.clear_scalings_log()
    assert "speculative" not in report_of(of_llama).rounds


@pytest.mark.parametrize("lockstep", [True, 5])
def test_what_is_recorded_is_that_of_two_passes(lockstep: Any, drafts: Any) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    inputs = {"input_ids": tokens(2), "max_new_tokens": LONG, **asked}
    expected, found = generated(drafts, lockstep=False, **inputs), generated(drafts, lockstep=lockstep, **inputs)
    for name in ("scores", "logits"):
        assert len(found[name]) == LONG
        for one, other in zip(found[name], expected[name], strict=True):
            assert_close(one, other, atol=2e-5, rtol=1e-4)
    for one, other in ((found, expected), (found.past_key_values, expected.past_key_values)):
        assert type(one) is type(other)
    halves = ((c, c.base) for c in (found.past_key_values, expected.past_key_values))
    for one, other in zip(*halves, strict=True):
        assert one.get_seq_length() == other.get_seq_length() == 9 + LONG - 1
        for layer, own in zip(one.layers, other.layers, strict=True):
            assert_close(layer.keys, own.keys, atol=2e-5, rtol=1e-4)
            assert_close(layer.values, own.values, atol=2e-5, rtol=1e-4)


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten())

    def end(self) -> None:
        self.parts.append(torch.tensor([-1]))


def test_streamers_and_stopping_criteria_work(of_llama: Any) -> None:
    streamer = Collected()
    stop = StoppingCriteriaList([MaxLengthCriteria(20)])
    found = generated(
        of_llama, input_ids=tokens(1), max_new_tokens=LONG, lockstep=True, streamer=streamer, stopping_criteria=stop
    )
    assert torch.cat(streamer.parts).tolist() == [*found[0].tolist(), -1]
    assert found.shape[1] == 20


def test_the_log_and_hooks_see_what_they_see_of_two_passes(of_llama: Any) -> None:
    class Seen(RoutingHook):
        def __init__(self) -> None:
            self.scalings: list[Tensor] = []

        def routed(self, output: Any) -> None:
            self.scalings.append(output.final)

    records: list[list[Tensor]] = []
    for lockstep in (False, True):
        hook = Seen()
        detach = attach(of_llama, hook)
        of_llama.clear_scalings_log()
        of_llama.enable_scalings_logging()
        generated(of_llama, input_ids=tokens(2), max_new_tokens=12, lockstep=lockstep)
        of_llama.disable_scalings_logging()
        detach()
        records.append([*hook.scalings, *of_llama.get_scalings_log(), of_llama.get_latest_scalings()])
    of_llama.clear_scalings_log()
    assert len(records[0]) == len(records[1]) == 2 * 12 + 1
    for one, other in zip(*records, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)
