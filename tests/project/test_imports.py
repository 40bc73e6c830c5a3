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


def modules_after(code: str) -> set[str]:
    """The top-level modules that a new interpreter holds after running `code`."""
    report = "import sys; print('\\n' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def run_cli(*arguments: str) -> str:
    return f"from loramix.cli import main\ntry:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert modules_after("import loramix").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), *((c, "--help") for c in ("demo", "generate", "info", "inspect"))]
)
def test_help_loads_no_torch(arguments: tuple[str, ...]) -> None:
    assert modules_after(run_cli(*arguments)).isdisjoint(set(HEAVY) - set(LOADED_BY_THE_CLI))


def test_the_probe_sees_what_is_imported() -> None:
    assert {"typer", "loramix"} <= modules_after(run_cli("--help"))


def test_the_public_names_load_neither_peft_nor_what_draws() -> None:
    loaded = modules_after("import loramix\nfor name in loramix.__all__: getattr(loramix, name)")
    assert {"torch", "transformers"} <= loaded
    assert loaded.isdisjoint({"peft", "trl", "matplotlib"})


def test_the_fused_kernels_load_triton_only_when_they_are_needed() -> None:
    """Not here but in transformers, torch's compiler is imported, which takes triton along where it is installed."""
    assert "triton" not in modules_after("import loramix.layers.layer")


@pytest.mark.parametrize("blocked", [False, True], ids=["as it is", "triton missing"])
def test_a_mixture_on_a_cpu_does_without_triton(blocked: bool, experts: Callable[[str], dict[str, str]]) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        f"if {blocked}: sys.modules['triton'] = None\n"
        "from loramix import XLoraConfig, get_peft_model\n"
        "from support.tiny import llama, tokens\n"
        f"config = XLoraConfig(adapters={experts('llama')!r}, hidden_size=64)\n"
        "get_peft_model(llama(), config).generate(tokens(), max_new_tokens=2)\n"
        f"assert {OF_TRITON!r} not in sys.modules\n"
    )
    assert "loramix" in modules_after(code)


def test_every_module_imports_where_optional_packages_are_missing() -> None:
    everything = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import importlib, pkgutil, loramix\n"
        "for module in pkgutil.walk_packages(loramix.__path__, 'loramix.'):\n"
        f"    module.name == {OF_TRITON!r} or importlib.import_module(module.name)"
    )
    assert {"torch", "transformers"} <= modules_after(everything)
