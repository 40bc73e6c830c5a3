"""`loramix demo`: the command hands its options on, and tells the outcome by its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramix import demo


class Result:
    def __init__(self, succeeded: bool) -> None:
        self.succeeded = succeeded

    def to_dict(self) -> dict[str, Any]:
        return {"succeeded": self.succeeded}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, demo.DemoSettings]]:
    found: list[tuple[Path, demo.DemoSettings]] = []

    def run_demo(out: Path, settings: demo.DemoSettings) -> Result:
        print("a table")
        found.append((out, settings))
        return Result(succeeded=settings.seed != 13)

    monkeypatch.setattr(demo, "run_demo", run_demo, raising=False)
    return found


def test_defaults(loramix, calls) -> None:
    done = loramix("demo")
    assert (done.code, done.out) == (0, "a table\n")
    assert calls == [(Path("loramix-demo"), demo.DemoSettings())]


def test_options_reach_the_library(loramix, calls) -> None:
    loramix("demo", "--out", "tour", "--steps", 3, "--seed", 5)
    assert calls == [(Path("tour"), demo.DemoSettings(steps=3, seed=5))]


def test_json_has_stdout_for_itself(loramix, calls) -> None:
    done = loramix("demo", "--json")
    assert json.loads(done.out) == {"succeeded": True}
    assert done.err == "a table\n"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_a_router_that_does_not_earn_its_place_is_exit_code_1(words: tuple[str, ...], loramix, calls) -> None:
    assert loramix("demo", "--seed", 13, *words).code == 1
