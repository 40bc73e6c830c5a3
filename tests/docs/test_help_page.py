"""docs/cli.md shows the help texts as they are."""

from __future__ import annotations

import importlib.metadata
import runpy
from pathlib import Path

import pytest

from loramix._versions import release_of

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.skipif(
    release_of(importlib.metadata.version("typer")) < (0, 29),
    reason="the page is made with typer 0.29; this one is older",
)
def test_the_page_is_the_help_texts() -> None:
    script = runpy.run_path(str(DOCS / "make_cli.py"))
    assert (DOCS / "cli.md").read_text() == script["page"](), "run `make docs`"
