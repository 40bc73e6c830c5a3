"""constraints.txt pins everything that the package and its extras ask for, and nothing but names and versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [requirement for requirement in map(Requirement, asked) if requirement.name != project["name"]]


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_name_and_a_public_version(line: str) -> None:
    assert re.fullmatch(r"[\w.-]+==[\w.]+", line)


def test_lines_are_sorted_and_no_name_stands_twice() -> None:
    assert sorted(LINES, key=str.upper) == LINES
    assert len(PINS) == len(LINES)


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_is_asked_for_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])
