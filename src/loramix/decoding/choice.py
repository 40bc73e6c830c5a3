"""What `generate(lockstep=…)` may be, parsed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, SupportsIndex

from loramix.decoding.strategies import DraftingStrategy, Lockstep, PromptLookup, Sequential, Speculative
from loramix.errors import ConfigurationError


@dataclass(frozen=True)
class Automatic:
    """For each token the strategy that is expected to be the cheapest (`scheduler`)."""


AUTOMATIC = Automatic()
Choice = Automatic | Sequential | DraftingStrategy
"""How to decode. A strategy that cannot compute a token falls back to lockstep, and lockstep to sequential decoding."""
LockstepArgument = bool | int | Literal["lookup"] | Choice | None
"""A choice as a user writes it: see `LockstepMethods.generate`."""


def parse(value: object) -> Choice:
    """The choice that an argument, or an entry of a generation configuration, names.

    Raises:
        ConfigurationError: it names none.
    """
    match value:
        case None:
            return Automatic()
        case Automatic() | Sequential() | DraftingStrategy():
            return value
        case "lookup":
            return PromptLookup()
        case SupportsIndex() if value.__index__() >= 0:
            drafts = value.__index__()
            return Speculative(drafts) if drafts > 1 else Lockstep() if drafts else Sequential()
        case _:
            raise ConfigurationError(
                "lockstep is True, False, None, a number of drafts, or 'lookup'.",
                received=f"lockstep={value!r}",
                remedy="leave it out: the cheapest strategy is found during generation",
            )
