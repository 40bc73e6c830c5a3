"""The picture of the architecture shows the packages as they are."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path

import loramix

DOCS = Path(__file__).parents[2] / "docs"


def test_the_picture_names_the_packages_that_exist() -> None:
    drawn = re.findall(r'data-module="(\w+)"', (DOCS / "architecture.svg").read_text())
    public = [module.name for module in pkgutil.iter_modules(loramix.__path__) if not module.name.startswith("_")]
    assert sorted(drawn) == sorted(public)


def test_the_picture_is_the_one_that_its_script_draws() -> None:
    script = runpy.run_path(str(DOCS / "make_architecture.py"))
    assert (DOCS / "architecture.svg").read_text() == script["picture"](), "run `make docs`"
