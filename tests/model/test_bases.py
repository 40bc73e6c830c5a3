"""The table of base models (docs/bases.md): a fixed sample of it, and one that is drawn anew each day, come out again.

`make test` draws by the date; `SEED=20261127 make test` draws what that day's run drew. A class whose row differs joins
`FIXED` when it has been mended.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transformers
from benchmarks.bases.checks import WRONG, check, status
from benchmarks.bases.table import JSON, PAGE, page, sample

FOUND = json.loads(JSON.read_text(encoding="utf-8"))
ROWS: dict[str, dict[str, str]] = {name: cells for rows in FOUND["rows"].values() for name, cells in rows.items()}
SEED = int(os.environ.get("SEED", "0"))
FIXED = [
    "LlavaForConditionalGeneration",
    "MobileNetV2ForImageClassification",
    "MambaForCausalLM",
    "XLNetForSequenceClassification",
    "BertLMHeadModel",
    "MoonshineStreamingForConditionalGeneration",
    "Blip2ForConditionalGeneration",
    "BlenderbotSmallForCausalLM",
    "CohereAsrForConditionalGeneration",
    "MoonshineForConditionalGeneration",
]


def test_no_cell_is_a_wrong_number() -> None:
    bad = {name: check for name, cells in ROWS.items() for check, cell in cells.items() if status(cell) == WRONG}
    assert not bad


def test_the_page_is_that_of_the_figures() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(FOUND)


@pytest.mark.skipif(
    transformers.__version__ != FOUND["transformers"], reason=f"the table is of transformers {FOUND['transformers']}"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", dict.fromkeys((*FIXED, *sample(FOUND, SEED, 6))))
def test_a_row_comes_out_again(name: str, tmp_path: Path) -> None:
    found = {label: cell for label, cell in check(name, tmp_path).items() if label != "compiled"}
    expected = {label: cell for label, cell in ROWS[name].items() if label != "compiled"}
    assert {label: status(cell) for label, cell in found.items()} == {
        label: status(cell) for label, cell in expected.items()
    }, f"drawn with SEED={SEED}: {found}"
