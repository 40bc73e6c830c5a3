"""The contract of a decoding strategy.

A round computes the next token of each row, and perhaps tokens after it. Every strategy yields the tokens of sequential
decoding: a draft decides how much is computed, never which token is chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeVar

from jaxtyping import Int
from torch import Tensor

from loramix.decoding.forwards import Forwards
from loramix.decoding.state import DecodingState, Step


class Round(NamedTuple):
    """The result of a round.

    Attributes:
        out: the model's output for the next token.
        is_typical: whether its time counts for the strategy's price; False if it had fewer drafts than usual.
        recoveries: forwards of the scaling pass to recover from rejected drafts.
    """

    out: Any
    is_typical: bool = True
    recoveries: int = 0


class Strategy(ABC):
    """How to compute the next token. Frozen: all that changes is in the generation's state."""

    name: ClassVar[str]  # in reports

    @abstractmethod
    def is_ready(self, state: DecodingState) -> bool:
        """Whether it can compute the next token."""

    @abstractmethod
    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        """Compute it."""


class DraftingStrategy(Strategy):
    """A strategy with drafts, and what the scheduler must know of it.

    Forwards are counted in forwards over one token of each row: the two passes of a token are two of them.
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
        """The expected number of tokens of a round, at this acceptance rate."""

    def recoveries(self, acceptance: float) -> float:
        """The expected number of forwards of the scaling pass, in each round, to recover from rejected drafts."""
        return 0.0

    def prior(self, forwards: Forwards) -> float | None:
        """The acceptance rate to expect before anything is known; None if `compare` measures it."""
        return 1.0

    def compare(self, ids: Int[Tensor, "B 1"], state: DecodingState, forwards: Forwards) -> None:
        """Add to the acceptance whether drafts that were not computed would have been these tokens.

        Called for every token. Of several strategies with the same drafter, one implements it.
        """


S = TypeVar("S", bound=DraftingStrategy)
registered: list[DraftingStrategy] = []


def register_strategy(kind: type[S]) -> type[S]:
    """Let `generate` choose a strategy, with its defaults; a decorator."""
    registered.append(kind())
    return kind


def tokens_of_window(acceptance: float, drafts: int) -> float:
    """The expected tokens of a window: 1 + p + p² + …, since a draft counts only if all before it are accepted."""
    return sum(acceptance**i for i in range(drafts + 1))
