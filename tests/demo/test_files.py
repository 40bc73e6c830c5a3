"""The demo as files: what a new user trains with."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramix.demo import DOMAINS
from loramix.demo.files import write_files
from loramix.errors import SaveError
from loramix.training.check import check
from loramix.training.settings import TrainSettings


def test_the_run_that_is_written_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_files(tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == sorted(names)
    monkeypatch.chdir(tmp_path / "work")
    plan = check(TrainSettings.read("run.yaml")).plan
    assert plan.experts == list(DOMAINS)
    assert plan.labelled == plan.rows > 4
    assert plan.eval_rows >= 4
    assert plan.cache_bytes < 500e6


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SaveError, match="not empty"):
        write_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
