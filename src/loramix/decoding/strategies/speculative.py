"""Several drafts of the scaling pass, then one verifying forward of the mixture pass.

The scaling pass runs k tokens ahead, one after the other; then the mixture pass reads the token and all k drafts at
once. This pays where a matrix product over many rows costs little more than one over two, as on many CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loramix.decoding.acceptance import SCALING_PASS
from loramix.decoding.forwards import Forwards
from loramix.decoding.state import DecodingState, Step
from loramix.decoding.strategies.base import DraftingStrategy, Round, register_strategy, tokens_of_window
from loramix.decoding.strategies.lockstep import Lockstep
from loramix.decoding.window import Window

DRAFTS = 7  # with the token before them, eight rows cost a matrix product little more than two (docs/benchmarks.md)


@register_strategy
@dataclass(frozen=True)
class Speculative(DraftingStrategy):
    """k drafts of the scaling pass, each made from the one before.

    Args:
        drafts: k.
    """

    drafts: int = DRAFTS
    name: ClassVar[str] = "speculative"
    drafter: ClassVar[str] = SCALING_PASS

    @property
    def forwards(self) -> tuple[int, int]:
        return self.drafts + 1, 1

    @property
    def row_forwards_at_risk(self) -> int:
        return 2 * self.drafts

    def tokens(self, acceptance: float) -> float:
        return tokens_of_window(acceptance, self.drafts)

    def prior(self, forwards: Forwards) -> float | None:
        return Lockstep().prior(forwards)

    def is_ready(self, state: DecodingState) -> bool:
        return state.draft_limit(self.drafts) > 1  # one draft is lockstep's, in half the forwards

    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        count, ids, states = state.draft_limit(self.drafts), [step.ids], list[torch.Tensor]()
        for i in range(count):
            hidden, draft = forwards.scale_and_draft(step, ids[-1], step.positions + i, state.length + i)
            states.append(hidden)
            ids.append(draft[:, None])
        states.append(forwards.scale(ids[-1], step.positions + count, state.length + count))
        made = forwards.route(torch.cat(states, 1), step.inputs)
        drafts = torch.cat(ids[1:], 1)
        out = forwards.mix(step, drafts, made.routing)
        window = Window(drafts, out, made.activated, self.drafter, forwards.mixture.settings())
        return Round(forwards.take(window), is_typical=count == self.drafts)
