"""What must not be imported: `import loramix` and the help texts stay light, and PEFT is never a dependency."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "numpy", "matplotlib", "pandas", "safetensors", "typer", "rich")
OPTIONAL = ("peft", "trl", "matplotlib", "pandas", "accelerate", "datasets")
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
    "arguments", [("--help",), ("--version",), *((c, "--help") for c in ("demo", "generate", "info"))]
)
def test_help_loads_no_torch(arguments: tuple[str, ...]) -> None:
    assert modules_after(run_cli(*arguments)).isdisjoint(set(HEAVY) - set(LOADED_BY_THE_CLI))


def test_the_probe_sees_what_is_imported() -> None:
    assert {"typer", "loramix"} <= modules_after(run_cli("--help"))


def test_the_public_names_load_neither_peft_nor_what_draws() -> None:
    loaded = modules_after("import loramix\nfor name in loramix.__all__: getattr(loramix, name)")
    assert {"torch", "transformers"} <= loaded
    assert loaded.isdisjoint({"peft", "trl", "matplotlib"})


def test_every_module_imports_where_optional_packages_are_missing() -> None:
    everything = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import importlib, pkgutil, loramix\n"
        "for module in pkgutil.walk_packages(loramix.__path__, 'loramix.'):\n"
        "    importlib.import_module(module.name)"
    )
    assert {"torch", "transformers"} <= modules_after(everything)
