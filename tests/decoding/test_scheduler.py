"""The cheapest strategy is taken. The model is real; the time that its rounds take is said by the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import pytest

from loramix.decoding.scheduler import FIRST_WAIT, LONGEST_WAIT, SAMPLES, Measurements, RoundTimes
from loramix.decoding.strategies import Lockstep, PromptLookup, Sequential, Speculative, Strategy
from loramix.decoding.strategies.base import tokens_of_window
from loramix.passes.state import state_of
from support.generation import forced, generated, random_text, report_of
from support.tiny import tokens

Seconds = dict[type[Strategy], float]
CPU: Seconds = {Sequential: 2.0, Lockstep: 1.7, Speculative: 9.9, PromptLookup: 4.0}
GPU: Seconds = {Sequential: 2.0, Lockstep: 1.0, Speculative: 9.0, PromptLookup: 2.0}
SLOW: Seconds = {Sequential: 2.0, Lockstep: 2.5, Speculative: 40.0, PromptLookup: 40.0}


class Machine:
    """A clock that only rounds move on, and the rounds.

    Args:
        seconds: of each strategy's rounds; a forward of the scaling pass after a rejected draft takes one more.
    """

    def __init__(self, seconds: Seconds, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.now = seconds, 0.0
        self.rounds: list[str] = []
        monkeypatch.setattr("loramix.decoding.scheduler.time", SimpleNamespace(perf_counter=lambda: self.now))
        for kind in seconds:
            monkeypatch.setattr(kind, "run", self._timed(kind, kind.run))

    def _timed(self, kind: type[Strategy], run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            round = run(*args)
            self.now += self.seconds[kind] + round.recoveries
            self.rounds.append(kind.name)
            return round

        return timed


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seconds], Machine]:
    return lambda seconds: Machine(seconds, monkeypatch)


@pytest.fixture
def model(of_llama: Any) -> Generator[Any]:
    """Nothing is known of it, and every draft of its scaling pass is right."""
    state_of(of_llama).measurements.clear()
    of_llama.set_global_scaling_weight(0.0)
    yield of_llama
    of_llama.set_global_scaling_weight(1.0)
    state_of(of_llama).measurements.clear()


def without_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy texts of tiny models repeat themselves; here no n-gram is found."""
    monkeypatch.setattr("loramix.decoding.ngrams.NGramIndex.drafts", lambda self, count: [])


def measurements(model: Any) -> Measurements:
    (found,) = state_of(model).measurements.values()
    return found


def test_tokens_of_a_window() -> None:
    assert tokens_of_window(0.0, 7) == 1.0
    assert tokens_of_window(1.0, 7) == 8.0
    assert tokens_of_window(0.5, 2) == 1.75


def test_a_price_is_the_time_of_a_round_over_the_tokens_it_yields() -> None:
    known = Measurements()
    known.of(Lockstep()).seconds.extend([1.5] * SAMPLES)
    known.of(Speculative()).seconds.extend([9.9] * SAMPLES)
    assert known.price(Lockstep(), 0.9, 2.0) == pytest.approx(1.6)  # a forward more for one draft in ten
    assert known.price(Speculative(), 1.0, 2.0) == pytest.approx(9.9 / 8)
    assert known.price(Speculative(), 0.0, 2.0) == pytest.approx(9.9)
    assert known.price(PromptLookup(), 1.0, 2.0) == known.assumed_price(PromptLookup(), 1.0, 2.0) < 0.5
    assert known.assumed_price(Lockstep(), 0.0, 2.0) > 2.0  # drafts that are never right are never worth a trial
    assert known.assumed_price(Lockstep(), 1.0, 2.0) < 2.0


@pytest.mark.parametrize(("seconds", "best"), [(CPU, "speculative"), (GPU, "lockstep"), (SLOW, "sequential")])
def test_the_cheapest_strategy_is_taken(
    seconds: Seconds, best: str, machine: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a second generation nearly from its first token on."""
    without_repeats(monkeypatch)
    clock = machine(seconds)
    expected = generated(model, input_ids=tokens(1), max_new_tokens=33, lockstep=False)
    for _ in range(2):
        clock.now, clock.rounds = 0.0, []
        found = generated(model, input_ids=tokens(1), max_new_tokens=33)
        assert found.tolist() == expected.tolist()
    assert Counter(clock.rounds).most_common(1)[0][0] == best
    prices = {"speculative": 9.9 / 8, "lockstep": 1.0, "sequential": 2.0}
    assert clock.now <= 32 * prices[best] * 1.1


def test_what_is_not_known_is_tried_and_given_up(machine: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequential rounds first, then as few of each other strategy as tell its price, then none for long."""
    without_repeats(monkeypatch)
    clock = machine(SLOW)
    generated(model, input_ids=tokens(1), max_new_tokens=80)
    assert clock.rounds[:SAMPLES] == ["sequential"] * SAMPLES
    counts = Counter(clock.rounds)
    assert counts["lockstep"] <= 2 * (SAMPLES + 2)  # a second trial after FIRST_WAIT rounds
    assert counts["sequential"] >= 80 - 8 * 2 * SAMPLES - counts["lockstep"]
    assert measurements(model).of(Lockstep()).wait > FIRST_WAIT


def test_a_text_that_repeats_itself_is_looked_up_while_that_is_right(machine: Any, model: Any) -> None:
    model.set_global_scaling_weight(1.0)
    again, new = random_text(6), random_text(200)
    clock = machine(CPU)
    text = forced(lambda n: again[n % 6] if n < 50 else new[n])
    generated(model, input_ids=tokens(1), max_new_tokens=80, logits_processor=[text])
    rounds = Counter(clock.rounds)
    assert rounds["prompt_lookup"] >= 3
    assert report_of(model).accepted > 0.8
    assert clock.rounds[-20:] == ["sequential"] * 20
    assert clock.now < 2.0 * 79 * 0.8


def test_drafts_that_become_right_are_noticed_without_a_trial(
    machine: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_repeats(monkeypatch)
    clock, text = machine(GPU), random_text(100)
    generated(
        model, input_ids=tokens(1), max_new_tokens=80, logits_processor=[forced(lambda n: text[n] if n < 40 else None)]
    )
    assert clock.rounds[:30] == ["sequential"] * 30
    assert clock.rounds[-20:] == ["lockstep"] * 20


def test_what_all_is_compared_with_is_measured_again(machine: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two passes were measured in bad moments; now they are cheaper than what seemed to pay."""
    monkeypatch.setattr("loramix.decoding.scheduler.FRESH", 16)
    monkeypatch.setattr("loramix.decoding.scheduler.DRAFTING", (Lockstep(),))
    clock = machine({**SLOW, Sequential: 9.0})
    generated(model, input_ids=tokens(1), max_new_tokens=12)
    assert clock.rounds[-1] != "sequential"
    clock.seconds[Sequential] = 1.0
    clock.rounds = []
    generated(model, input_ids=tokens(1), max_new_tokens=40)
    assert clock.rounds[-10:] == ["sequential"] * 10


def test_what_was_too_slow_is_measured_again_less_and_less_often() -> None:
    times, forgotten = RoundTimes(), []
    for number in range(1, 8 * FIRST_WAIT):
        if times.typical is None:
            times.seconds.extend([3.0] * SAMPLES)
        times.pass_over()
        if times.typical is None:
            forgotten.append(number)
    assert forgotten == [FIRST_WAIT, 3 * FIRST_WAIT, 7 * FIRST_WAIT]
    assert times.wait == 8 * FIRST_WAIT <= LONGEST_WAIT


def test_only_full_windows_are_measured(model: Any) -> None:
    generated(model, input_ids=tokens(1), max_new_tokens=16)
    generated(model, input_ids=tokens(1), max_new_tokens=5)  # three drafts at most
    before = list(measurements(model).of(Speculative()).seconds)
    assert sum(report_of(model).rounds.values())
    generated(model, input_ids=tokens(1), max_new_tokens=5)
    assert list(measurements(model).of(Speculative()).seconds) == before
