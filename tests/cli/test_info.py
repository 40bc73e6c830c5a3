"""`loramix info`: the facts of a folder, as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from loramix.demo import DOMAINS


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


def test_the_mixture_that_ships(loramix) -> None:
    document = json.loads(loramix("info", "demo", "--json").out)
    assert [expert["name"] for expert in document["experts"]] == list(DOMAINS)
    assert document["router"]["layerwise"]


def test_fields_of_a_later_version_are_warned_about_in_one_line(loramix, folders, tmp_path: Path) -> None:
    config = shutil.copytree(folders.experts["math"], tmp_path / "later") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_tomorrow": 1}))
    done = loramix("info", config.parent)
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert len(done.err.splitlines()) == 1
    assert "of_tomorrow" in done.err
