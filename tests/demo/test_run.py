"""The tour from end to end, at tiny settings."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from loramix.demo import DOMAINS, DemoResult, DemoSettings, run, run_demo
from loramix.demo.compare import COLUMNS, MIXED, SWITCHING, XLORA
from loramix.errors import LoramixError, SaveError
from loramix.model.build import XLoraModel

TINY = DemoSettings(steps=2, batch=2, windows=1, tokens=4)


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    console = Console(file=io.StringIO(), width=120)
    result = run_demo(tmp_path_factory.mktemp("tour"), TINY, console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


@pytest.mark.slow
def test_the_reloaded_mixture_is_the_trained_one(tour: tuple[DemoResult, str]) -> None:
    assert tour[0].reload_is_exact
    assert (tour[0].mixture / "adapter_config.json").is_file()


@pytest.mark.slow
def test_it_prints_what_it_measured(tour: tuple[DemoResult, str]) -> None:
    result, text = tour
    for column in COLUMNS:
        assert column in text
        assert f"{result.comparison.bits_per_byte[XLORA][column]:.3f}" in text


@pytest.mark.slow
def test_it_writes_for_every_domain(tour: tuple[DemoResult, str]) -> None:
    for domain, written in zip(DOMAINS, tour[0].written, strict=True):
        assert written.title == domain
        assert len(written.tokens) == TINY.tokens


@pytest.mark.slow
def test_it_draws(tour: tuple[DemoResult, str]) -> None:
    assert tour[0].picture is not None
    assert tour[0].picture.is_file()
    assert len(tour[0].domains) == tour[0].switching.kept
    assert set(tour[0].domains) == set(DOMAINS)


@pytest.mark.slow
def test_its_result_is_json(tour: tuple[DemoResult, str]) -> None:
    document: dict[str, Any] = json.loads(json.dumps(tour[0].to_dict()))
    assert document["succeeded"] == tour[0].succeeded
    assert document["comparison"]["bits_per_byte"][XLORA]["mixed"] > 0
    assert all(len(token["weights"]) == len(DOMAINS) for text in document["written"] for token in text["tokens"])
    assert [len(row) for row in document["switching"]["weights"]] == [len(DOMAINS)] * len(tour[0].domains)


def test_without_matplotlib_there_is_no_picture_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    demo_mixture: XLoraModel,
    demo_tokenizer: PreTrainedTokenizerFast,
) -> None:
    monkeypatch.setattr(run, "can_draw", lambda: False)
    console = Console(file=io.StringIO(), width=120)
    path = run.draw_switching(*run.route_switching(demo_mixture, demo_tokenizer), tmp_path, console)
    assert isinstance(console.file, io.StringIO)
    assert path is None
    assert "loramix[plot]" in console.file.getvalue()


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(LoramixError, match="accelerate"):
        run_demo(tmp_path, TINY)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign" / "mixture").mkdir(parents=True)
    (tmp_path / "foreign" / "mixture" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("it has begun"))
    for out in ("file", "file/below", "foreign", "null\0byte"):
        with pytest.raises(SaveError):
            run_demo(tmp_path / out, TINY)


@pytest.mark.slow
def test_the_trainer_leaves_nothing_beside_the_mixture(tour: tuple[DemoResult, str]) -> None:
    folder = tour[0].mixture.parent
    assert {path.name for path in folder.iterdir()} == {"mixture", "routing.png"}


@pytest.mark.slow
def test_every_sentence_of_the_verdict_is_a_line_of_its_own(tour: tuple[DemoResult, str]) -> None:
    lines = tour[1].splitlines()
    for text in (MIXED, SWITCHING):
        assert sum(line.startswith(f"{text}:") and "X-LoRA" in line for line in lines) == 1
