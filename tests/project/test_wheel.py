"""What is installed is whole: the wheel holds the package, its typing marker and the demo's models, and no more.

It declares what it imports, its types are seen by a user's type checker, and the source distribution passes its tests.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
REPORT = {f"loramix/analysis/report/report.{ending}" for ending in ("html", "css", "js")}


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


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


def test_the_wheel_is_small_enough_to_install_anywhere(wheel_file: Path) -> None:
    assert wheel_file.stat().st_size <= 9e6


def imported(folder: Path) -> set[str]:
    """The packages outside of the standard library that a package's files import, by the names they install."""
    modules: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    installed = importlib.metadata.packages_distributions()
    others = modules - sys.stdlib_module_names - {"loramix"}
    return {canonicalize_name(installed[module][0]) for module in others}


def test_it_declares_what_it_imports_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(lines: list[str]) -> set[str]:
        return {canonicalize_name(Requirement(line).name) for line in lines} - {"loramix"}

    core, optional = names(project["dependencies"]), names([*extras["train"], *extras["inspect"], *extras["plot"]])
    found = imported(SOURCE / "loramix")
    assert core <= found
    assert found <= core | optional | {"triton"}  # which comes with torch where there is one
    not_imported = {"accelerate", "tensorboard"}  # transformers does, for its Trainer
    assert optional - found <= not_imported


CHECKED = """
from transformers import AutoModelForCausalLM
from loramix import PeftModel, XLoraConfig, XLoraModel, get_peft_model

base = AutoModelForCausalLM.from_pretrained("base")
mixture = get_peft_model(base, XLoraConfig(hidden_size=64, adapters={"math": "experts/math"}))
reveal_type(mixture)
reveal_type(mixture.expert_names)
reveal_type(PeftModel.from_pretrained(base, "mixture"))
mixture.set_topk_lora("two")
XLoraConfig(hidden="64")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_a_type_checker_sees_the_types_of_a_users_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CHECKED)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "script.py"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert re.findall(r'Type of "(.+)" is "(.+)"', out) == [
        ("mixture", "XLoraModel"),
        ("mixture.expert_names", "list[str]"),
        ('PeftModel.from_pretrained(base, "mixture")', "PeftModel"),
    ]
    errors = [line for line in out.splitlines() if " error: " in line]
    assert ["set_topk_lora" in errors[0], 'No parameter named "hidden"' in errors[1], len(errors)] == [True, True, 2]


@pytest.mark.slow
def test_the_source_distribution_passes_its_tests(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path / "sdist")) as source:
        source.extractall(tmp_path, filter="data")
    (root,) = (path for path in tmp_path.iterdir() if path.name.startswith("loramix-"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    some = ["tests/config", "tests/formats", "tests/project/test_wheel.py", "tests/project/test_constraints.py"]
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    done = subprocess.run([*command, *some], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "loramix = loramix.cli:main" in wheel.read(entry_points).decode()
