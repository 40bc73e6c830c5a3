"""The two passes one after the other: no drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loramix.decoding.forwards import Forwards
from loramix.decoding.state import DecodingState, Step, Unscored
from loramix.decoding.strategies.base import Round, Strategy


@dataclass(frozen=True)
class Sequential(Strategy):
    """A forward of the scaling pass, then one of the mixture pass.

    Their outputs show, at the next token, whether the scaling pass would have drafted it.
    """

    name: ClassVar[str] = "sequential"

    def is_ready(self, state: DecodingState) -> bool:
        return True

    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        hidden = forwards.scale(step.ids, step.positions, state.length)
        made = forwards.route(hidden, step.inputs)
        out = forwards.mix(step, step.ids[:, :0], made.routing)
        state.unscored = Unscored(hidden[:, -1], out.logits[:, -1])
        return Round(out)
