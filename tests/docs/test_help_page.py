"""docs/cli.md shows the help texts as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_the_help_texts() -> None:
    script = runpy.run_path(str(DOCS / "make_cli.py"))
    assert (DOCS / "cli.md").read_text() == script["page"](), "run `make docs`"
