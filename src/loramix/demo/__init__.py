"""Four small experts that ship with loramix, and a tour that mixes them.

`run_demo()` builds the mixture, trains its router and compares; `load()` loads the shipped mixture.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramix.demo.bundle import base, experts, load, mixture, tokenizer
    from loramix.demo.corpus import DOMAINS
    from loramix.demo.run import DemoResult, DemoSettings, run_demo

__all__ = ["DOMAINS", "DemoResult", "DemoSettings", "base", "experts", "load", "mixture", "run_demo", "tokenizer"]

_HOMES = {
    **dict.fromkeys(("base", "experts", "load", "mixture", "tokenizer"), "bundle"),
    **dict.fromkeys(("DemoResult", "DemoSettings", "run_demo"), "run"),
    "DOMAINS": "corpus",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
