"""Decoding strategies, one in each file.

To add one, write its class in a file here (the contract is `base.DraftingStrategy`) and name it in `DRAFTING`: from
then on `generate` weighs it with the others, and takes it alone as `lockstep=` its instance.
"""

from __future__ import annotations

from loramix.decoding.strategies.base import DraftingStrategy, Strategy
from loramix.decoding.strategies.fixed import Fixed
from loramix.decoding.strategies.lockstep import Lockstep
from loramix.decoding.strategies.prompt_lookup import PromptLookup
from loramix.decoding.strategies.sequential import Sequential
from loramix.decoding.strategies.speculative import Speculative

DRAFTING: tuple[DraftingStrategy, ...] = (PromptLookup(), Speculative(), Lockstep())
"""What the scheduler chooses from; of equally cheap ones the first."""

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
