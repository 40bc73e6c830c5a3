"""The picture and the page of the architecture show the house as it stands."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path

import loramix

DOCS = Path(__file__).parents[2] / "docs"


def test_the_picture_names_the_modules_that_exist() -> None:
    drawn = re.findall(r'data-module="(\w+)"', (DOCS / "architecture.svg").read_text())
    assert sorted(drawn) == sorted(module.name for module in pkgutil.iter_modules(loramix.__path__))


def test_the_picture_is_the_one_that_its_script_draws() -> None:
    script = runpy.run_path(str(DOCS / "make_architecture.py"))
    assert (DOCS / "architecture.svg").read_text() == script["picture"](), "run `make docs`"
