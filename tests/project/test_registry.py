"""Adding a file is enough: the modules of a package are imported, and register what they define."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loramix._registry import import_modules
from loramix.decoding.strategies import DRAFTING
from loramix.formats.format import expert_format, mixture_format
from loramix.routers import router_kinds


def test_every_module_is_imported_in_the_order_of_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_three"
    package.mkdir()
    (package / "__init__.py").write_text("seen = []\n")
    for name in ("b", "a", "c"):
        (package / f"{name}.py").write_text("import package_of_three\npackage_of_three.seen.append(__name__)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_modules("package_of_three", [str(package)])
    assert sys.modules["package_of_three"].seen == [f"package_of_three.{name}" for name in "abc"]


def test_what_loramix_registers() -> None:
    assert [strategy.name for strategy in DRAFTING] == ["lockstep", "prompt_lookup", "speculative"]
    assert {"classifier", "static"} <= {kind.kind for kind in router_kinds()}
    assert (expert_format("lora").name, mixture_format("xlora").name) == ("lora", "xlora")
