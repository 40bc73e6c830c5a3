"""What the project says of itself in several files agrees."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import loramix

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "pyproject.toml"
URLS: dict[str, str] = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["project"]["urls"]
NOT_OURS = {".git", ".venv", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
ADDRESS = re.compile(rb"(?:https?://|www\.|git@|ssh://)[^\s\"'<>)\]}]*loramix[^\s\"'<>)\]}]*", re.IGNORECASE)


def files() -> list[Path]:
    """What belongs to the project: no build, no environment, no cache."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and not name.endswith(".egg-info")]
        found += [Path(folder, name) for name in names]
    return [path for path in found if path.is_file() and path.stat().st_size < 2**20]


def test_the_addresses_stand_in_one_place() -> None:
    """There is no public address yet: example.org is reserved for such uses (RFC 2606)."""
    found = {(path.relative_to(ROOT), hit.decode()) for path in files() for hit in ADDRESS.findall(path.read_bytes())}
    assert found == {(Path("pyproject.toml"), url) for url in URLS.values()}
    assert all(url.startswith(URLS["Homepage"]) for url in URLS.values())


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == loramix.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_changelog_has_this_version_or_is_unreleased() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## (Unreleased|{re.escape(loramix.__version__)}\b)", changelog, re.MULTILINE)


def test_the_hooks_are_the_targets_of_make_check() -> None:
    (targets,) = re.findall(r"^check: ([a-z ]+?) *##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert sorted(hook["entry"] for hook in repository["hooks"]) == sorted(f"make {name}" for name in targets.split())


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_page_is_listed_for_machines_and_in_the_site(page: Path) -> None:
    assert f"](docs/{page.name})" in (ROOT / "llms.txt").read_text(encoding="utf-8")
    assert re.search(rf"\b{page.name}$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.*")), ids=lambda path: path.name)
def test_every_example_is_listed(example: Path) -> None:
    assert f"(../examples/{example.name})" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
