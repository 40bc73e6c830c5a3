"""Valid folders with one thing changed load to equal numbers, or are refused by name (`benchmarks/mutations.py`).

A sample, drawn by the date as in `tests/model/test_bases.py`; the counts of a long run are in docs/mutations.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from benchmarks.mutations import FOLDERS, run

FOUND = json.loads((Path(__file__).parents[2] / "docs" / "mutations.json").read_text(encoding="utf-8"))
SEED = int(os.environ.get("SEED", "0"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_changed_folder_is_equal_or_refused(kind: str, tmp_path: Path) -> None:
    faults = [case for case in run(kind, 16, SEED, tmp_path) if case.outcome.startswith("FAULT")]
    assert not faults, f"drawn with SEED={SEED}"


def test_the_long_run_found_no_fault() -> None:
    assert FOUND["faults"] == 0
    assert FOUND["counts"].keys() == FOLDERS.keys()
    assert sum(sum(outcomes.values()) for outcomes in FOUND["counts"].values()) >= 10_000
