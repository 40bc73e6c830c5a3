"""Which way of decoding is taken: the one that is measured to be the cheapest, and others are tried now and then."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import pytest

from decoding.test_exactness import generated
from loramix.decoding.scheduler import AHEAD, FRESH, Pace, Trials, expected
from support.tiny import tokens


def pace(apart: float, right: float, wrong: float, share: float, **rounds: float) -> Pace:
    found = Pace()
    found.apart.extend([apart] * 9)
    found.right.extend([right] * 9)
    found.wrong.extend([wrong] * 9)
    found.drafts.extend([True] * round(20 * share) + [False] * round(20 * (1 - share)))
    for way, seconds in rounds.items():
        getattr(found, way).extend([seconds] * 9)
    return found


def the_pace(model: Any) -> Pace:
    (found,) = model._loramix.paces.values()
    return found


def choose(found: Pace, **changes: Any) -> str:
    return found.choose(**({"drafts": AHEAD, "repeats": False} | changes))


def test_it_pays_where_a_token_is_expected_to_be_cheaper() -> None:
    assert Pace().pays() is None
    assert pace(apart=2.0, right=1.2, wrong=2.4, share=0.9).pays() is True
    assert pace(apart=2.0, right=1.2, wrong=2.4, share=0.1).pays() is False
    assert pace(apart=2.0, right=2.1, wrong=3.0, share=1.0).pays() is False


def test_tokens_of_a_round() -> None:
    assert expected(0.0, 7) == 1.0
    assert expected(1.0, 7) == 8.0
    assert expected(0.5, 2) == 1.75


def test_the_cheapest_way_is_taken() -> None:
    assert choose(Pace()) == "apart"
    assert choose(pace(2.0, 1.2, 2.4, 0.9, ahead=20.0)) == "together"
    assert choose(pace(2.0, 1.2, 2.4, 1.0, ahead=8.0)) == "ahead"  # a second a token
    assert choose(pace(2.0, 1.2, 2.4, 1.0, ahead=8.0), drafts=0) == "together"
    assert choose(pace(2.0, 1.2, 2.4, 0.6, ahead=4.0)) == "together"  # drafts are wrong too often to be worth a trial
    assert choose(pace(1.0, 1.2, 2.4, 1.0, ahead=20.0)) == "apart"


def test_a_text_that_repeats_itself_is_read_so_while_that_is_right() -> None:
    found = pace(2.0, 1.2, 2.4, 0.9, ahead=20.0, lookup=4.0)
    found.found.extend([True] * 8)
    assert choose(found, repeats=True) == "lookup"
    assert choose(found) == "together"
    found.found.extend([False] * 24)
    assert choose(found, repeats=True) == "together"


def test_a_way_that_is_not_known_is_tried() -> None:
    assert choose(pace(2.0, 1.2, 2.4, 0.9)) == "ahead"
    assert choose(pace(2.0, 1.2, 2.4, 0.9, ahead=20.0), repeats=True) == "lookup"


def test_windows_that_are_too_short_to_be_measured_are_not_tried() -> None:
    assert choose(pace(2.0, 1.2, 2.4, 1.0), drafts=AHEAD) == "ahead"
    assert choose(pace(2.0, 1.2, 2.4, 1.0), drafts=AHEAD - 1, repeats=True) == "together"
    assert choose(pace(2.0, 1.2, 2.4, 1.0, ahead=8.0), drafts=AHEAD - 1) == "ahead"


def test_what_all_is_compared_with_is_measured_again() -> None:
    """The two passes were measured in bad moments; now they are cheaper than what seemed to pay."""
    found = pace(9.0, 1.2, 2.4, 0.9, ahead=20.0)
    ways = []
    for _ in range(2 * FRESH):
        ways.append(choose(found))
        if ways[-1] == "apart":
            found.apart.append(1.0)
        else:
            found.right.append(1.2)
            found.drafts.append(True)
    assert ways.count("apart") > FRESH / 2
    assert ways.index("apart") == FRESH


def test_trials_become_rare_where_they_fail_and_frequent_where_they_do_not() -> None:
    trials = Trials(2)
    went = [trials.go(False) for _ in range(32 + 2 + 64 + 2)]
    assert [i for i, go in enumerate(went) if go] == [31, 32, 96, 97]
    assert trials.wait == 128
    assert trials.go(True)
    assert trials.wait == 32
    known = deque([True])
    assert Trials(2, wait=1).go(False, known)
    assert not known  # a trial finds out anew


def test_by_itself_it_stays_in_lockstep_while_that_is_cheaper(of_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "pays", lambda self: True)
    monkeypatch.setattr(Pace, "_promises", lambda self: False)
    monkeypatch.setattr(of_llama._loramix, "paces", {})
    drafts = []
    for _ in range(2):
        generated(of_llama, input_ids=tokens(1), max_new_tokens=20)
        drafts.append(of_llama.lockstep_report.rounds)
    assert drafts == [Counter(apart=4, together=15), Counter(together=19)]  # four tokens measure the other way


def test_by_itself_it_is_tried_less_and_less_where_it_does_not_pay(
    of_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 32, 64, 128, … tokens, for six tokens each."""
    monkeypatch.setattr(Pace, "pays", lambda self: False if len(self.drafts) >= 4 else None)
    monkeypatch.setattr(Pace, "_promises", lambda self: False)
    monkeypatch.setattr("loramix.decoding.drafts.Repeats.drafts", lambda self, count: [])
    monkeypatch.setattr(of_llama._loramix, "paces", {})
    ways = []
    for _ in range(4):
        generated(of_llama, input_ids=tokens(1), max_new_tokens=61)
        ways.append(of_llama.lockstep_report.drafts)
    assert the_pace(of_llama).together_again.wait == 128
    assert ways == [4 + 5, 5, 0, 0]  # until enough is known, and a trial after 32 tokens; one after 64; then 128


@pytest.mark.parametrize("way", ["ahead", "lookup"])
def test_by_itself_it_reads_ahead_where_that_is_cheapest(
    way: str, of_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own seconds are measured as they come, so here they are said to be none."""
    of_llama.set_global_scaling_weight(0.0)
    inputs = {"input_ids": tokens(1), "max_new_tokens": 60}
    expected_ids = generated(of_llama, lockstep=False, **inputs)
    known = pace(2.0, 1.2, 2.4, 1.0)
    known.found.extend([True] * 9)
    monkeypatch.setattr(Pace, f"_{way}", lambda self: 0.0)
    monkeypatch.setattr(of_llama._loramix, "paces", {(1, of_llama.device, of_llama.dtype): known})
    found = generated(of_llama, **inputs)
    of_llama.set_global_scaling_weight(1.0)
    assert found.tolist() == expected_ids.tolist()
    assert of_llama.lockstep_report.rounds[way]
    assert len(getattr(known, way)) >= (3 if way == "ahead" else 1)  # rounds of AHEAD drafts are measured
    assert of_llama.lockstep_report.forwards < 2 * of_llama.lockstep_report.tokens
    assert AHEAD == 7
