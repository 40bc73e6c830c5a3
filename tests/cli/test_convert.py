"""`loramix convert`: a mixture in another format, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loramix.formats import load_mixture


def test_there_and_back(loramix, folders, tmp_path: Path) -> None:
    done = loramix("convert", folders.mixture, tmp_path / "peft", "--to", "peft")
    assert (done.code, done.err) == (0, "")
    assert "experts math as 0, code as 1" in done.out
    assert "note: The experts' names are not kept" in done.out
    experts = [word for i, name in enumerate(("math", "code")) for word in ("--expert", f"{name}={tmp_path}/peft/{i}")]
    assert loramix("convert", tmp_path / "peft", tmp_path / "original", "--to", "original", *experts).code == 0
    assert (tmp_path / "original" / "ordering.json").exists()
    assert loramix("convert", tmp_path / "original", tmp_path / "again", "--to", "loramix").code == 0
    before, after = load_mixture(folders.mixture), load_mixture(tmp_path / "again")
    assert list(after.config.adapters) == list(before.config.adapters)
    assert all(torch.equal(after.router[name], tensor) for name, tensor in before.router.items())
    assert loramix("info", tmp_path / "original").code == 0
    assert loramix("generate", tmp_path / "original", "--prompt", "a", "--max-new-tokens", "1").code == 0


def test_the_report_as_json(loramix, folders, tmp_path: Path) -> None:
    done = loramix("convert", folders.mixture, tmp_path / "new", "--to", "original", "--json")
    document = json.loads(done.out)
    assert (document["format"], document["source_format"], document["ordering"]) == ("original", "xlora", True)
    assert document["experts"] == {"math": "math", "code": "code"}


@pytest.mark.parametrize("words", [["--to", "onnx"], []])
def test_a_format_must_be_named(words: list[str], loramix, folders, tmp_path: Path) -> None:
    assert loramix("convert", folders.mixture, tmp_path / "new", *words).code == 2


def test_a_folder_with_something_in_it_is_refused(loramix, folders) -> None:
    done = loramix("convert", folders.mixture, folders.base, "--to", "peft")
    assert done.code == 1
    assert done.err.startswith("SaveError: ")


def test_the_mixture_that_ships(loramix, tmp_path: Path) -> None:
    assert loramix("convert", "demo", tmp_path / "new", "--to", "loramix").code == 0
    assert list(load_mixture(tmp_path / "new").config.adapters) == list(load_mixture_of_the_demo())


def load_mixture_of_the_demo() -> dict[str, str]:
    from loramix import demo

    return load_mixture(demo.mixture()).config.adapters
