"""Prompt lookup decoding: drafts from the text itself. They cost no forward; one of each pass verifies them.

Where the last n-gram has occurred before, the drafts are the tokens that followed it then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from loramix.decoding.acceptance import TEXT
from loramix.decoding.forwards import Forwards
from loramix.decoding.state import DecodingState, Step
from loramix.decoding.strategies.base import DraftingStrategy, Round, register_strategy, tokens_of_window
from loramix.decoding.strategies.speculative import DRAFTS
from loramix.decoding.window import Window


@register_strategy
@dataclass(frozen=True)
class PromptLookup(DraftingStrategy):
    """k drafts from the text, for one row alone.

    Args:
        drafts: k.
    """

    drafts: int = DRAFTS
    name: ClassVar[str] = "prompt_lookup"
    drafter: ClassVar[str] = TEXT

    @property
    def forwards(self) -> tuple[int, int]:
        return 0, 2

    @property
    def row_forwards_at_risk(self) -> int:
        return 2 * self.drafts

    def tokens(self, acceptance: float) -> float:
        return tokens_of_window(acceptance, self.drafts)

    def prior(self, forwards: Forwards) -> float | None:
        return None

    def compare(self, ids: Int[Tensor, "B 1"], state: DecodingState, forwards: Forwards) -> None:
        under_way = state.window is not None and state.window.drafter == self.drafter  # these are verified
        drafts = [] if state.text is None or under_way else state.text.drafts(1)
        if drafts:
            state.acceptance_of(self.drafter).add(drafts == ids[0].tolist())

    def is_ready(self, state: DecodingState) -> bool:
        return bool(self._lookup(state))

    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        drafts = step.ids.new_tensor([self._lookup(state)])
        hidden = forwards.scale(*step.followed_by(drafts), state.length)
        made = forwards.route(hidden, step.inputs)
        out = forwards.mix(step, drafts, made.routing)
        window = Window(drafts, out, made.activated, self.drafter, forwards.mixture.settings())
        return Round(forwards.take(window), is_typical=drafts.shape[1] == self.drafts)

    def _lookup(self, state: DecodingState) -> list[int]:
        return [] if state.text is None else state.text.drafts(state.draft_limit(self.drafts))
