"""The example notebook: its cells run in order, without a failure, and it shows what they show."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))
NOTEBOOK = json.loads((ROOT / "examples" / "routing.ipynb").read_text(encoding="utf-8"))


def kinds(notebook: dict) -> list[list[str]]:
    return [
        [kind for output in cell["outputs"] for kind in sorted(output.get("data", {"text": ""}))]
        for cell in SCRIPT["code_cells"](notebook)
    ]


def printed(notebook: dict) -> list[str]:
    outputs = [output for cell in SCRIPT["code_cells"](notebook) for output in cell["outputs"]]
    return ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]


@pytest.mark.slow
def test_its_cells_run_and_show_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again = SCRIPT["executed"](json.loads(json.dumps(NOTEBOOK)))
    assert kinds(again) == kinds(NOTEBOOK)
    assert printed(again) == printed(NOTEBOOK), "run `make docs`"
    assert (tmp_path / "routing.html").is_file()


def test_it_is_executed_and_small() -> None:
    counts = [cell["execution_count"] for cell in SCRIPT["code_cells"](NOTEBOOK)]
    assert counts == list(range(1, len(counts) + 1))
    assert {"text/html", "image/png"} <= {kind for cell in kinds(NOTEBOOK) for kind in cell}
    assert len(json.dumps(NOTEBOOK)) < 200_000
