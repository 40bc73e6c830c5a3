"""One pass, once `fix_routing(after=…)` has fixed the routing to the mean of the first tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loramix.decoding.forwards import Forwards
from loramix.decoding.state import DecodingState, Step
from loramix.decoding.strategies.base import Round, Strategy


@dataclass(frozen=True)
class Fixed(Strategy):
    """The mixture pass alone: with fixed routing, no scalings are computed. The state selects it, never the user."""

    name: ClassVar[str] = "fixed"

    def is_ready(self, state: DecodingState) -> bool:
        return state.fixed is not None

    def run(self, step: Step, state: DecodingState, forwards: Forwards) -> Round:
        return Round(forwards.mix(step, step.ids[:, :0], state.fixed))
