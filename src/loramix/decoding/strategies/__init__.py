"""Decoding strategies, one in each file.

To add one, write its class in a file here (the contract is `base.DraftingStrategy`) and decorate it with
`register_strategy`. `generate` then chooses among all of them; `lockstep=` with an instance uses that one alone.
"""

from __future__ import annotations

from operator import attrgetter

from loramix._registry import import_modules
from loramix.decoding.strategies.base import DraftingStrategy, Strategy, registered
from loramix.decoding.strategies.fixed import Fixed
from loramix.decoding.strategies.lockstep import Lockstep
from loramix.decoding.strategies.prompt_lookup import PromptLookup
from loramix.decoding.strategies.sequential import Sequential
from loramix.decoding.strategies.speculative import Speculative

import_modules(__name__, __path__)

DRAFTING: tuple[DraftingStrategy, ...] = tuple(sorted(registered, key=attrgetter("name")))
"""The strategies that the scheduler chooses from; the first wins a tie."""

__all__ = [
    "DRAFTING",
    "DraftingStrategy",
    "Fixed",
    "Lockstep",
    "PromptLookup",
    "Sequential",
    "Speculative",
    "Strategy",
]
