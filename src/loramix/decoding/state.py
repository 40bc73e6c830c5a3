"""The state of one generation's decoding: one explicit record that the session and the strategies read and change.

B: batch. H: hidden size. V: vocabulary. L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loramix.decoding.acceptance import Acceptance
from loramix.decoding.ngrams import NGramIndex
from loramix.decoding.report import LockstepReport
from loramix.decoding.row_cache import RowCache
from loramix.decoding.window import Window
from loramix.layers.routing import TensorRouting
from loramix.passes.state import PassSettings


class Step(NamedTuple):
    """The token to compute next, in each row.

    Attributes:
        call: the model's own forward.
        inputs: its arguments.
        ids: (B, 1).
        positions: (B, 1).
    """

    call: Callable[..., Any]
    inputs: Mapping[str, Any]
    ids: Int[Tensor, "B 1"]
    positions: Int[Tensor, "B 1"]

    def followed_by(self, drafts: Int[Tensor, "B k"]) -> tuple[Int[Tensor, "B 1+k"], Int[Tensor, "B 1+k"]]:
        """The token and drafts after it, and their positions."""
        ids = torch.cat([self.ids, drafts], 1)
        return ids, self.positions + torch.arange(ids.shape[1], device=ids.device)


class Ahead(NamedTuple):
    """The scaling pass one token ahead of the mixture pass, on its own draft.

    Attributes:
        settings: what its forward was computed with.
        token: (B,), the draft that it has read.
        hidden: (B, 1, H), its hidden states there.
        next: (B,), its draft of the token after that.
    """

    settings: PassSettings
    token: Int[Tensor, " B"]
    hidden: Float[Tensor, "B 1 H"]
    next: Int[Tensor, " B"]


class Unscored(NamedTuple):
    """Outputs at the last token, kept to check whether the scaling pass would have drafted the next one.

    Attributes:
        hidden: (B, H), the scaling pass's.
        logits: (B, V), the mixture pass's.
    """

    hidden: Float[Tensor, "B H"]
    logits: Float[Tensor, "B V"]


@dataclass
class RunningMean:
    """The sum of the scalings of the first tokens, until the routing is fixed to their mean.

    Attributes:
        after: the number of tokens to average over.
        count: how many of them have been added.
        total: (B, 1, L, E), L 1 where all layers share them.
    """

    after: int
    count: int = 0
    total: Tensor | None = None

    def add(self, scalings: Float[Tensor, "B 1 #L E"]) -> Float[Tensor, "B 1 #L E"] | None:
        """Add the scalings of one token. Returns the mean once all have been added, else None."""
        self.total = scalings if self.total is None else self.total + scalings
        self.count += 1
        return self.total / self.after if self.count == self.after else None


@dataclass
class DecodingState:
    """The state of one generation after its prompt.

    Attributes:
        store: keys and values of both passes.
        length: the number of tokens that both passes have read and whose outputs `generate` has received.
        stop: the length at which the generation ends.
        last_position: the base model's last position; None if positions are unlimited.
        finished: (B,), True for rows that have ended and are only padded from now on.
        report: the counts.
        acceptance: the acceptance of each drafter's drafts.
        text: the n-gram index for prompt lookup; None if it is not used.
        fixing: the running mean to which the routing will be fixed; None if it will not be fixed.
        fixed: the routing, once it is fixed.
        observed: whether hooks or the log must see each token, so that no token may be computed ahead.
        window: the tokens that the mixture pass has computed ahead.
        ahead: the scaling pass, one token ahead.
        rejected: the rows whose draft in `ahead` was rejected.
        unscored: the outputs that show whether the scaling pass would have drafted the next token.
    """

    store: RowCache
    length: int
    stop: int
    last_position: int | None
    finished: Tensor
    report: LockstepReport
    acceptance: dict[str, Acceptance] = field(default_factory=dict[str, Acceptance])
    text: NGramIndex | None = None
    fixing: RunningMean | None = None
    fixed: TensorRouting | None = None
    observed: bool = False
    window: Window | None = None
    ahead: Ahead | None = None
    rejected: list[int] = field(default_factory=list[int])
    unscored: Unscored | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.store.batch

    @property
    def positions_left(self) -> int:
        """The number of positions after the next token's."""
        return self.stop if self.last_position is None else self.last_position - self.length

    def draft_limit(self, most: int) -> int:
        """The number of tokens to draft: at most `most`, none past the end, and 0 while tokens are observed."""
        return 0 if self.observed else max(0, min(most, self.positions_left, self.stop - 2 - self.length))

    @property
    def excess(self) -> int:
        """Row-forwards so far beyond two for each row and token."""
        ahead = 0 if self.ahead is None else self.batch - len(self.rejected)
        return self.report.row_forwards - 2 * self.batch * self.report.tokens - ahead

    def acceptance_of(self, drafter: str) -> Acceptance:
        """The acceptance of a drafter's drafts."""
        return self.acceptance.setdefault(drafter, Acceptance())

    def verify(self, drafts: Int[Tensor, " B"], ids: Int[Tensor, "B 1"], drafter: str) -> list[int]:
        """The rows whose draft is rejected, where `generate` chose another token. Finished rows reject no draft."""
        rejected = ((drafts != ids[:, 0]) & ~self.finished).nonzero()[:, 0].tolist()
        verified = len(drafts) - int(self.finished.sum())
        self.acceptance_of(drafter).add(not rejected)
        self.report.drafts += verified
        self.report.accepted_drafts += verified - len(rejected)
        return rejected
