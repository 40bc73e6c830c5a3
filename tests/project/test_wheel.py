"""What is installed is whole: the wheel holds the package, its typing marker and the demo's models, and no more."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
REPORT = {f"loramix/analysis/report/report.{ending}" for ending in ("html", "css", "js")}


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


def test_every_file_of_the_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "loramix").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if name.startswith("loramix/")}
    assert packed == expected
    assert {"loramix/py.typed", "loramix/demo/data/base/model.safetensors", *REPORT} <= packed


def test_what_made_the_demo_is_in_the_source_distribution_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as source:
        packed = {name.partition("/")[2] for name in source.getnames()}
    assert "tools/train_demo.py" in packed
    assert not [name for name in wheel.namelist() if "train_demo" in name or name.startswith("tools/")]
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    needed = [line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist:")]
    assert not [line for line in needed if line.startswith("Requires-Dist: tokenizers") and "extra" not in line]


def test_the_wheel_is_small_enough_to_install_anywhere(wheel: zipfile.ZipFile) -> None:
    assert sum(entry.file_size for entry in wheel.infolist()) <= 12 * 1024**2


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "loramix = loramix.cli:main" in wheel.read(entry_points).decode()
