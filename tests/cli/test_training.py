"""`loramix train`, `train-expert` and `eval`: the options reach the library, and what it found is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.commands import Outcome
from support.training_files import Files

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
Command = Callable[..., Outcome]


@pytest.fixture
def run_file(files: Files, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    content = files.settings(tmp_path / "run", data={"train": str(files.data), "eval": str(files.held_out)})
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_dry_run_shows_the_plan_and_makes_nothing(loramix: Command, run_file: Path, tmp_path: Path) -> None:
    done = loramix("train", run_file, "--dry-run", "--set", "trainer.max_steps=7")
    assert (done.code, done.err) == (0, "")
    for fact in ("math, code, prose", "12, 12 of them with an expert", "optimizer steps", "7", "total"):
        assert fact in done.out
    assert not (tmp_path / "run").exists()
    document = json.loads(loramix("train", run_file, "--dry-run", "--json").out)
    assert document["steps"] == 4
    assert document["memory_total"] > document["memory"]["base model"] > 0


def test_options_say_what_a_file_would(loramix: Command, files: Files, run_file: Path, tmp_path: Path) -> None:
    experts = [word for name, path in files.experts.items() for word in ("--expert", f"{name}={path}")]
    words = ("--base", files.base, *experts, "--data", files.data, "--output", tmp_path / "run", "--dry-run", "--json")
    options = json.loads(loramix("train", *words, "--set", "mixture.xlora_depth=1", "--set", "trainer.max_steps=4").out)
    file = json.loads(loramix("train", run_file, "--dry-run", "--json").out)
    differ = {"eval_rows", "memory", "memory_total"}
    assert {k: v for k, v in options.items() if k not in differ} == {k: v for k, v in file.items() if k not in differ}


def test_a_run_prints_its_evaluation_and_eval_prints_the_same(
    loramix: Command, run_file: Path, files: Files, tmp_path: Path
) -> None:
    done = loramix("train", run_file, "--json")
    assert done.code == 0
    printed = json.loads(done.out)
    assert printed["mixture"] == str(tmp_path / "run" / "mixture")
    trained = printed["evaluation"]
    evaluated = json.loads(loramix("eval", tmp_path / "run" / "mixture", "--data", files.held_out, "--json").out)
    assert evaluated["rows"]["X-LoRA"]["all"]["loss"] == pytest.approx(trained["rows"]["X-LoRA"]["all"]["loss"])
    assert evaluated["rows"]["X-LoRA"]["all"]["tokens"] == trained["rows"]["X-LoRA"]["all"]["tokens"]
    table = loramix(
        "eval", tmp_path / "run" / "mixture", "--data", files.held_out, "--figure", "perplexity", "--limit", 1
    )
    assert table.code == 0
    assert "Perplexity" in table.out
    assert all(
        name in table.out for name in ("base model", "math", "uniform mixture", "X-LoRA", "oracle", "without code")
    )


def test_new_experts_are_made_from_a_file_or_from_options(loramix: Command, files: Files, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to learn from, and more of them " * 8)
    content = files.settings(tmp_path / "run", data={"train": str(text), "eval": str(files.held_out)})
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump({**content, "experts": {"math": files.experts["math"], "new": 2, "r": 3}}))
    dry = loramix("train", path, "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    assert "new experts:            e0, e1" in dry.out
    done = loramix("train", path, "--json", "--set", "trainer.max_steps=1")
    assert done.code == 0
    assert "New experts train with it: e0, e1; objectives.load_balance: 0.01." in done.err
    printed = json.loads(done.out)
    assert printed["dead_experts"] == []
    described: dict[str, Any] = json.loads(loramix("info", Path(printed["mixture"]) / "e1", "--json").out)
    assert described["experts"][0]["ranks"] == [3]
    words = ("--base", files.base, "--data", text, "--output", tmp_path / "other", "--set", "experts.new=8")
    options = json.loads(loramix("train", *words, "--set", "experts.r=2", "--dry-run", "--json").out)
    assert options["new_experts"] == options["experts"] == [f"e{number}" for number in range(8)]


def test_an_expert_is_trained(loramix: Command, files: Files, tmp_path: Path) -> None:
    words = (
        "--base",
        files.base,
        "--data",
        files.data,
        "--output",
        tmp_path / "new",
        "--rank",
        2,
        "--target",
        "q_proj",
    )
    dry = loramix("train-expert", *words, "--dry-run")
    assert (dry.code, dry.out) == (0, "Everything is in place; no weights were loaded.\n")
    assert not (tmp_path / "new").exists()
    done = loramix("train-expert", *words, "--set", "trainer.max_steps=1", "--set", "trainer.disable_tqdm=true")
    assert done.code == 0
    assert done.out.splitlines()[-1] == str(tmp_path / "new")
    described: dict[str, Any] = json.loads(loramix("info", tmp_path / "new", "--json").out)
    assert described["experts"][0]["ranks"] == [2]
    assert described["experts"][0]["targets"] == ["q_proj"]


def test_what_is_wrong_is_told(loramix: Command, run_file: Path, files: Files, tmp_path: Path) -> None:
    for words, error in (
        (("train", run_file, "--data", "./nowhere"), "DataError"),
        (("train", tmp_path / "nowhere.yaml"), "ConfigurationError"),
        (("train",), "ConfigurationError"),
        (("train", run_file, "--set", "trainer.max_stepz=1"), "ConfigurationError"),
        (("eval", tmp_path, "--data", files.data), "CheckpointNotFoundError"),
        (("eval", files.experts["math"], "--data", files.data), "ConfigurationError"),
        (
            ("train-expert", "--base", files.base, "--data", files.data, "--output", tmp_path / "x", "--target", "no"),
            "ConfigurationError",
        ),
    ):
        done = loramix(*words)
        assert (done.code, done.out) == (1, ""), words
        assert done.err.startswith(f"{error}: "), done.err
        assert [line.split(":")[0].strip() for line in done.err.splitlines()[1:]] == ["received", "remedy"]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--expert", "math"),
        ("train", "--expert", "a=b", "--expert", "a=c"),
        ("train", "--set", "steps"),
        ("train", "--set", "a=["),
        ("train-expert", "--base", "b", "--data", "d", "--output", "o", "--set", "mixture.xlora_depth=1"),
        ("eval", "demo"),
        ("eval", "demo", "--data", "d", "--figure", "beauty"),
    ],
)
def test_wrong_usage_is_exit_code_2(words: tuple[str, ...], loramix: Command) -> None:
    assert loramix(*words).code == 2
