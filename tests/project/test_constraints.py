"""Constraints pin everything that the package and its extras ask for, and nothing but names and versions.

constraints-lowest.txt pins the lower bounds themselves, of what is not there for the tests alone.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FILES = ("constraints.txt", "constraints-lowest.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAISED = {"torch", "tqdm", "pyyaml", "tensorboard", "matplotlib", "pandas", "jaxtyping"}
"""Pinned above their lower bounds: torch, see the file; and what all newer versions serve alike."""


def lines(file: str) -> list[str]:
    return [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]


def pins(file: str) -> dict[str, str]:
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines(file))}


def requirements(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(line for extra in extras or optional for line in optional[extra])]
    return [requirement for requirement in map(Requirement, asked) if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("line", [line for file in FILES for line in lines(file)])
def test_a_line_is_a_name_and_a_public_version(line: str) -> None:
    assert re.fullmatch(r"[\w.-]+==[\w.]+", line)


@pytest.mark.parametrize("file", FILES)
def test_lines_are_sorted_and_no_name_stands_twice(file: str) -> None:
    assert sorted(lines(file), key=str.upper) == lines(file)
    assert len(pins(file)) == len(lines(file))


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_is_asked_for_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins("constraints.txt")[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("requirement", requirements("train", "inspect", "plot", "test"), ids=str)
def test_the_lowest_pins_are_within_the_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins("constraints-lowest.txt")[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("requirement", requirements("train", "inspect", "plot"), ids=str)
def test_the_lowest_pins_are_the_bounds(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name not in RAISED:
        version = Version(pins("constraints-lowest.txt")[name])
        (bound,) = requirement.specifier
        assert version.release[:3] == (*Version(bound.version).release, 0, 0)[:3]
