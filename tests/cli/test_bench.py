"""`loramix bench`: its structure; no test looks at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from support.commands import Folders, Outcome

Command = Callable[..., Outcome]
WAYS = ["base model", "two passes", "generate", "fixed routing"]


def test_every_way_is_timed(loramix: Command, folders: Folders) -> None:
    done = loramix("bench", folders.mixture, "--base", folders.base, "--tokens", 3, "--rounds", 2, "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    assert list(found["ways"]) == WAYS
    assert all(len(way["samples"]) == 2 and way["seconds"] > 0 for way in found["ways"].values())
    assert found["ways"]["base model"]["ratio"] == 1.0
    assert {"torch", "loramix"} <= set(found["machine"]["versions"])
    assert 1 <= found["forwards per token"] <= 2


def test_the_table_names_ways_and_machine(loramix: Command, folders: Folders) -> None:
    done = loramix("bench", folders.mixture, "--base", folders.base, "--tokens", 3, "--rounds", 1)
    assert done.code == 0
    assert all(name in done.out for name in (*WAYS, "forwards a token", "transformers"))


@pytest.mark.parametrize("words", [("--tokens", 1), ("--rounds", 0)])
def test_wrong_usage(words: tuple[Any, ...], loramix: Command, folders: Folders) -> None:
    assert loramix("bench", folders.mixture, *words).code == 2


def test_a_single_expert_is_refused(loramix: Command, folders: Folders) -> None:
    done = loramix("bench", folders.experts["math"], "--base", folders.base)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ConfigurationError: ")
