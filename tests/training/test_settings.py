"""Settings from YAML and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramix import ConfigurationError
from loramix.training.settings import Data, TrainSettings, parse_size, read_prompts, with_numbers

GOOD = {"base": "b", "experts": {"math": "m"}, "data": "d.jsonl"}


def test_a_file_and_what_is_put_over_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: b\nexperts: {math: m, code: c}\ndata: d.jsonl\ntrainer: {max_steps: 3, seed: 1}\ncache: 2MB\n"
    )
    found = TrainSettings.read(path, {"trainer.max_steps": 9, "data.eval": "e.jsonl", "mixture.xlora_depth": 2})
    assert found.experts == {"math": "m", "code": "c"}
    assert found.data == Data("d.jsonl", "e.jsonl")
    assert (found.trainer, found.mixture) == ({"max_steps": 9, "seed": 1}, {"xlora_depth": 2})
    assert found.cache_bytes == 2_000_000


def test_without_a_file() -> None:
    changes = {"base": "b", "experts": {"math": "m"}, "data.train": "d"}
    assert TrainSettings.read(None, changes) == TrainSettings("b", {"math": "m"}, Data("d"))


@pytest.mark.parametrize(
    ("size", "count"), [("500MB", 500_000_000), ("2 GiB", 2**31), ("1.5kb", 1500), (10, 10), ("10", 10)]
)
def test_sizes(size: Any, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "many", "-1", "0", "1e99", "5 apples", "nan"])
def test_what_is_no_size(size: str) -> None:
    with pytest.raises(ConfigurationError, match="number of bytes"):
        parse_size(size)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a key that is misspelt": ({"mixtur": {}}, "'mixture'"),
    "a key of data": ({"data": {"train": "d", "evl": "x"}}, "'eval'"),
    "data without training data": ({"data": {"eval": "x"}}, "data.train"),
    "no base": ({"base": None}, "no base"),
    "no experts": ({"experts": {}}, "no experts"),
    "experts as a list": ({"experts": ["a"]}, "experts"),
    "a folder said twice": ({"trainer": {"output_dir": "x"}}, "output_dir"),
    "adapters said twice": ({"mixture": {"adapters": {}}}, "adapters"),
    "another start": ({"init": {"method": "magic"}}, "magic"),
    "prompts without texts": ({"init": {"method": "prompts"}}, "init.prompts"),
    "texts without prompts": ({"init": {"method": "zeros", "prompts": "p"}}, "init"),
    "a base said twice": ({"mixture": {"base_model_name_or_path": "x"}}, "base_model_name_or_path"),
    "a revision said twice": ({"mixture": {"revision": "x"}}, "revision"),
    "data that is no path": ({"data": {"train": 5}}, "data.train=5"),
    "evaluation data that is no path": ({"data": {"train": "d", "eval": ["e"]}}, "data.eval"),
    "a folder for no cache": ({"cache_folder": "x"}, "without cache"),
    "a cache of no size": ({"cache": "lots"}, "lots"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_named(case: str) -> None:
    changes, said = WRONG[case]
    with pytest.raises(ConfigurationError) as caught:
        TrainSettings.from_dict({**GOOD, **changes})
    assert said in str(caught.value)


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\nexperts: {m: 1e3}\ndata: d\nobjectives: {z_loss: 1e-3, temperature: [4e0, 1]}\n")
    found = TrainSettings.read(path)
    assert found.objectives == {"z_loss": 0.001, "temperature": [4.0, 1]}
    assert with_numbers(["1e", "e5", "1.5E+2", {"a": "-2e-1"}]) == ["1e", "e5", 150.0, {"a": -0.2}]


@pytest.mark.parametrize("content", ["a: [", "- a", "", "\xff"])
def test_a_file_that_is_no_mapping(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigurationError, match=r"Settings are|names its base"):
        TrainSettings.read(path)
    with pytest.raises(ConfigurationError, match="can be read"):
        TrainSettings.read(tmp_path / "nowhere.yaml")


def test_prompts_are_texts_by_expert(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"math": "1 + 1", "code": ["a", "b"]}))
    assert read_prompts(path) == {"math": ["1 + 1"], "code": ["a", "b"]}
    (tmp_path / "math.txt").write_text("1 + 1")
    assert read_prompts(tmp_path) == {"math": tmp_path / "math.txt"}
    assert read_prompts({"math": str(path)}) == {"math": path}
    for wrong in ("{", "[]", '{"math": [1]}', '{"math": 3}'):
        path.write_text(wrong)
        with pytest.raises(ConfigurationError, match="JSON file of expert name"):
            read_prompts(path)
