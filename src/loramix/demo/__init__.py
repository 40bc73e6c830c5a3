"""Four small experts that ship with loramix, and a tour that mixes them.

`run_demo()` builds the mixture, trains its router and compares; `load()` loads the shipped mixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramix._lazy import loaded_at_first_use

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

__getattr__ = loaded_at_first_use(__name__, _HOMES)
