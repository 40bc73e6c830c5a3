"""The oldest versions: declared as they are checked, and refused in one line when loramix is imported."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from loramix import LoramixError, VersionError
from loramix._versions import LOWEST, check_versions, release_of

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_declared_bounds_are_those_that_are_checked() -> None:
    declared = map(Requirement, tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])
    bounds = {line.name: str(line.specifier) for line in declared}
    assert {name: bounds[name] for name in LOWEST} == {name: f">={a}.{b}" for name, (a, b) in LOWEST.items()}


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.13.0+cpu", (2, 13)), ("2.8.0a0+git1f2e", (2, 8)), ("5", (5, 0)), ("5.0.0.dev0", (5, 0)), ("4.57.3", (4, 57))],
)
def test_a_release_is_its_first_two_numbers(version: str, release: tuple[int, int]) -> None:
    assert release_of(version) == release


def test_versions_that_are_too_old_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.4.1+cu121", "transformers": "4.44.0"}.__getitem__)
    with pytest.raises(VersionError) as caught:
        check_versions({"torch": (2, 8), "transformers": (5, 0)})
    assert str(caught.value) == (
        "loramix needs torch>=2.8 and transformers>=5.0. received: torch 2.4.1+cu121 and transformers 4.44.0. "
        'remedy: pip install "torch>=2.8" "transformers>=5.0"'
    )
    assert isinstance(caught.value, LoramixError)
    assert isinstance(caught.value, ImportError)


def test_one_that_is_new_enough_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.4.1", "transformers": "5.9.0"}.__getitem__)
    with pytest.raises(VersionError) as caught:
        check_versions({"torch": (2, 8), "transformers": (5, 0)})
    assert "transformers" not in str(caught.value)


def test_a_package_without_metadata_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    check_versions()


def test_the_refusal_comes_with_the_import(tmp_path: Path) -> None:
    """An older torch in front of the path: its metadata alone is read."""
    metadata = tmp_path / "torch-2.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import loramix"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (line,) = [line for line in done.stderr.splitlines() if "VersionError:" in line]
    assert "received: torch 2.1.0. remedy: pip install" in line
    assert done.returncode == 1
