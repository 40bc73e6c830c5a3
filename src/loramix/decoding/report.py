"""The counts of one generation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class LockstepReport:
    """Counts of one generation, its prompt left out.

    Attributes:
        tokens: the number of tokens decoded in each row.
        forwards: forwards of the backbone: one for a pass alone, one for both passes together.
        row_forwards: the same weighted by size: a forward over n rows of t tokens counts n · t. Sequential decoding
            has 2 per row and token.
        drafts: the number of drafted tokens that were verified, in all rows.
        accepted_drafts: how many of them were accepted: they are the tokens that were chosen.
        rounds: how often each strategy ran, by its name: "sequential", "lockstep", "speculative", "prompt_lookup", or
            "fixed" once the routing is fixed.
        reason: why no drafts were used; None if they could be.
    """

    tokens: int = 0
    forwards: int = 0
    row_forwards: int = 0
    drafts: int = 0
    accepted_drafts: int = 0
    rounds: Counter[str] = field(default_factory=Counter)
    reason: str | None = None

    @property
    def forwards_per_token(self) -> float:
        """2 for sequential decoding, 1 + the share of rejected drafts for lockstep; nan without tokens."""
        return self.forwards / self.tokens if self.tokens else float("nan")

    @property
    def accepted(self) -> float:
        """The share of accepted drafts; nan without drafts."""
        return self.accepted_drafts / self.drafts if self.drafts else float("nan")
