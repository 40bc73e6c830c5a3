"""What a decoding strategy is.

A round computes the next token of each row, and perhaps tokens after it. Whatever the strategy, the tokens are those of
the two passes one after the other: a draft decides how much is computed, never what is chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Int
from torch import Tensor

from loramix.decoding.forwards import Forwards
from loramix.decoding.state import DecodingState, Step


class Round(NamedTuple):
    """What a round returned.

    Attributes:
        out: the model's output for the next token.
        is_typical: whether its time tells what the strategy's rounds cost; not so where it had fewer drafts.
        recoveries: forwards of the scaling pass that rejected drafts made necessary.
    """

    out: Any
    is_typical: bool = True
    recoveries: int = 0


class Strategy(ABC):
    """How to compute the next token. Frozen and without a state of its own: what changes is in the generation's."""

    name: ClassVar[str]  # in reports

    @abstractmethod
    def is_ready(self, state: DecodingState) -> bool:
        """Whether it can compute the next token."""

    @abstractmethod
    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        """Compute it."""


class DraftingStrategy(Strategy):
    """One with drafts, and what the scheduler has to know of it.

    A forward over one token of each row is the unit: half of a token's two passes.
    """

    drafter: ClassVar[str]  # whose acceptance decides what a round yields; strategies may share one

    @property
    @abstractmethod
    def forwards(self) -> tuple[int, int]:
        """Forwards of a round: over one token of each row, and over several tokens or both passes."""

    @property
    @abstractmethod
    def row_forwards_at_risk(self) -> int:
        """Row-forwards, for each row of the batch, that a round wastes if all drafts are rejected."""

    @abstractmethod
    def tokens(self, acceptance: float) -> float:
        """The tokens that a round yields, expected at this share of right drafts."""

    def recoveries(self, acceptance: float) -> float:
        """Forwards of the scaling pass that rejected drafts make necessary, expected for each round."""
        return 0.0

    def prior(self, forwards: Forwards) -> float | None:
        """The share of right drafts to expect before anything is known; None where `compare` will tell."""
        return 1.0

    def compare(self, ids: Int[Tensor, "B 1"], state: DecodingState, forwards: Forwards) -> None:
        """Tell the acceptance whether drafts that nothing was computed for would have been these tokens.

        Called for every token. Of strategies with one drafter, one does it.
        """


def tokens_of_window(acceptance: float, drafts: int) -> float:
    """Expected tokens of a window: the known one, and each draft before which all were right (1 + p + p² + …)."""
    return sum(acceptance**i for i in range(drafts + 1))
