"""Both passes in one forward, the scaling pass one token ahead.

Both passes run the same model, and each row and token has its own scalings. So a batch of 2 B rows holds both passes:
in rows 0 … B-1 the scaling pass reads its own greedy draft of the next token, in rows B … 2 B - 1 the mixture pass
reads the current token, with the scalings that the scaling pass made for it one step before. An accepted draft costs
nothing more; a rejected one costs a forward of the scaling pass alone, over its rows. A token costs 1 + (share of
rejected drafts) forwards instead of 2.

A rejected draft's slot in the store is written again, so nothing is cropped.

B: batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from loramix.decoding.acceptance import SCALING_PASS, would_draft
from loramix.decoding.forwards import Forwards
from loramix.decoding.state import Ahead, DecodingState, Step
from loramix.decoding.strategies.base import DraftingStrategy, Round, register_strategy


@register_strategy
@dataclass(frozen=True)
class Lockstep(DraftingStrategy):
    """One draft of the scaling pass, read in the same forward as the mixture pass's token."""

    name: ClassVar[str] = "lockstep"
    drafter: ClassVar[str] = SCALING_PASS

    @property
    def forwards(self) -> tuple[int, int]:
        return 0, 1

    @property
    def row_forwards_at_risk(self) -> int:
        return 1

    def tokens(self, acceptance: float) -> float:
        return 1.0

    def recoveries(self, acceptance: float) -> float:
        return 1.0 - acceptance

    def prior(self, forwards: Forwards) -> float | None:
        return 1.0 if forwards.plain_head is None else None

    def compare(self, ids: Int[Tensor, "B 1"], state: DecodingState, forwards: Forwards) -> None:
        head, unscored = forwards.plain_head, state.unscored
        if unscored is not None and head is not None and head.weight.device == unscored.hidden.device:
            right = would_draft(head, unscored.hidden, unscored.logits, ids[:, 0]) | state.finished
            state.acceptance_of(self.drafter).add(bool(right.all()))

    def is_ready(self, state: DecodingState) -> bool:
        return state.positions_left > 0

    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        known, recoveries = state.ahead, 0
        if known is None or state.rejected:
            known, recoveries = _recover(step, state, forwards), 1
        routing = forwards.route(known.hidden, step.inputs).routing
        hidden, after, out = forwards.scale_and_mix(step, known.next, routing)
        state.ahead = Ahead(forwards.mixture.settings(), known.next, hidden, after)
        return Round(out, recoveries=recoveries)


def _recover(step: Step, state: DecodingState, forwards: Forwards) -> Ahead:
    """Run the scaling pass over the token itself, in the rows that read a rejected draft."""
    known, rejected = state.ahead, state.rejected
    if known is None or len(rejected) == state.batch:
        hidden, after = forwards.scale_and_draft(step, step.ids, step.positions, state.length)
        return Ahead(forwards.mixture.settings(), step.ids[:, 0], hidden, after)
    rows = torch.tensor(rejected, device=step.ids.device)
    hidden, after = forwards.scale_and_draft(step, step.ids[rows], step.positions[rows], state.length, rows)
    merged = known.hidden.index_copy(0, rows, hidden), known.next.index_copy(0, rows, after)
    return Ahead(known.settings, step.ids[:, 0], *merged)
