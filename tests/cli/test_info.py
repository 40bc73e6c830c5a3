"""`loramix info`: the facts of a folder, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_mixture_as_text(loramix, folders) -> None:
    done = loramix("info", folders.mixture)
    assert done.code == 0
    assert done.err == ""
    for fact in ("mixture", str(folders.base), "experts (E):", "adapted layers (L):", "math", "code", "q_proj, v_proj"):
        assert fact in done.out


def test_a_mixture_as_json(loramix, folders) -> None:
    document = json.loads(loramix("info", folders.mixture, "--json").out)
    assert document["kind"] == "mixture"
    assert document["base_model"] == str(folders.base)
    assert (document["num_layers"], document["num_experts"]) == (6, 2)
    assert [expert["name"] for expert in document["experts"]] == ["math", "code"]
    assert [expert["ranks"] for expert in document["experts"]] == [[2], [3]]
    assert document["router"]["parameters"] == (64 + 1) * 6 * 2


def test_an_expert_has_no_router(loramix, folders) -> None:
    document = json.loads(loramix("info", folders.experts["code"], "--json").out)
    assert document["kind"] == "expert"
    assert document["router"] is None
    assert "router" not in loramix("info", folders.experts["code"]).out


@pytest.mark.parametrize("width", ["40", "200"])
def test_lines_fit_the_terminal(width: str, loramix, folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert max(map(len, loramix("info", folders.experts["math"]).out.splitlines()[1:])) <= int(width)


def test_no_such_folder_is_told_and_is_exit_code_1(loramix, tmp_path: Path) -> None:
    done = loramix("info", tmp_path / "nowhere")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("CheckpointNotFoundError: ")
    assert "\n  received: " in done.err
    assert "\n  remedy: " in done.err


def test_an_error_with_json_leaves_stdout_empty(loramix, tmp_path: Path) -> None:
    assert loramix("info", tmp_path, "--json").out == ""
