"""The table of formats in docs/mixtures.md is what conversions do."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_formats_is_made_by_conversions() -> None:
    script = runpy.run_path(str(DOCS / "make_formats.py"))
    assert script["BEGIN"] + script["section"]() + script["END"] in (DOCS / "mixtures.md").read_text(), (
        "run `make docs`"
    )
