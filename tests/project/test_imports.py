"""What must not be imported: `import loramix` and the help texts stay light, and PEFT is never a dependency."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "numpy", "matplotlib", "pandas", "safetensors", "typer", "rich")
OPTIONAL = ("peft", "trl", "matplotlib", "pandas", "accelerate", "datasets", "triton")
OF_TRITON = "loramix.layers.kernels"
LOADED_BY_THE_CLI = ("typer", "rich")


def modules_after(*stages: str) -> list[set[str]]:
    """The top-level modules that a new interpreter holds after running each piece of code, one after the other."""
    report = "print('\\nafter:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    code = "\n".join(["import sys", *(f"{stage}\n{report}" for stage in stages)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("after:")]
    assert len(found) == len(stages)
    return found


def run_cli(*arguments: str) -> str:
    return f"from loramix.cli import main\ntry:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass"


@pytest.fixture(scope="module")
def mixture_on_a_cpu(experts: Callable[[str], dict[str, str]]) -> str:
    """Code that builds a mixture and generates."""
    return (
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from loramix import XLoraConfig, get_peft_model\n"
        "from support.tiny import llama, tokens\n"
        f"config = XLoraConfig(adapters={experts('llama')!r}, hidden_size=64)\n"
        "get_peft_model(llama(), config).generate(tokens(), max_new_tokens=2)\n"
        f"assert {OF_TRITON!r} not in sys.modules"
    )


@pytest.fixture(scope="module")
def loaded(mixture_on_a_cpu: str) -> dict[str, set[str]]:
    """What a process holds that loads more and more."""
    stages = {
        "the package": "import loramix",
        "its layers": "import loramix.layers.layer",
        "its public names": "for name in loramix.__all__: getattr(loramix, name)",
        "a mixture": mixture_on_a_cpu,
    }
    return dict(zip(stages, modules_after(*stages.values()), strict=True))


@pytest.fixture(scope="module")
def loaded_without_optional_packages(mixture_on_a_cpu: str) -> dict[str, set[str]]:
    """The same where none of the optional packages can be imported."""
    stages = {
        "a mixture": f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n{mixture_on_a_cpu}",
        "every module": (
            "import importlib, pkgutil, loramix\n"
            "for module in pkgutil.walk_packages(loramix.__path__, 'loramix.'):\n"
            f"    module.name == {OF_TRITON!r} or importlib.import_module(module.name)"
        ),
    }
    return dict(zip(stages, modules_after(*stages.values()), strict=True))


def test_importing_the_package_loads_nothing_heavy(loaded: dict[str, set[str]]) -> None:
    assert loaded["the package"].isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), *((c, "--help") for c in ("demo", "generate", "info", "inspect"))]
)
def test_help_loads_no_torch(arguments: tuple[str, ...]) -> None:
    (found,) = modules_after(run_cli(*arguments))
    assert found.isdisjoint(set(HEAVY) - set(LOADED_BY_THE_CLI))


def test_the_probe_sees_what_is_imported() -> None:
    (found,) = modules_after(run_cli("--help"))
    assert {"typer", "loramix"} <= found


def test_the_public_names_load_neither_peft_nor_what_draws(loaded: dict[str, set[str]]) -> None:
    assert {"torch", "transformers"} <= loaded["its public names"]
    assert loaded["its public names"].isdisjoint({"peft", "trl", "matplotlib"})


def test_the_fused_kernels_load_triton_only_when_they_are_needed(loaded: dict[str, set[str]]) -> None:
    """Not here but in transformers, torch's compiler is imported, which takes triton along where it is installed."""
    assert "torch" in loaded["its layers"]
    assert "triton" not in loaded["its layers"]


@pytest.mark.parametrize("process", ["loaded", "loaded_without_optional_packages"], ids=["as it is", "triton missing"])
def test_a_mixture_on_a_cpu_does_without_triton(process: str, request: pytest.FixtureRequest) -> None:
    assert "loramix" in request.getfixturevalue(process)["a mixture"]


def test_every_module_imports_where_optional_packages_are_missing(
    loaded_without_optional_packages: dict[str, set[str]],
) -> None:
    assert {"torch", "transformers"} <= loaded_without_optional_packages["every module"]
