"""Tokens that the mixture pass has computed ahead.

B: batch. k: drafts. V: vocabulary. L: adapted layers. E: experts.
"""

from __future__ import annotations

import copy
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from loramix.passes.state import PassSettings


class Window:
    """The mixture pass's output for a known token and k drafts after it, returned one token at a time.

    A draft's output is returned once `generate` has chosen that very token. Any other token discards the window.

    Args:
        drafts: (B, k), in the order of the text.
        out: the model's output, with logits (B, 1 + k, V).
        scalings: of the known token and of each draft, before top-k.
        drafter: where the drafts came from.
        settings: those of the forward; if they change, the window is discarded.
    """

    def __init__(
        self,
        drafts: Int[Tensor, "B k"],
        out: Any,
        scalings: Float[Tensor, "B 1+k #L E"],
        drafter: str,
        settings: PassSettings,
    ) -> None:
        self.drafter, self.settings = drafter, settings
        self._drafts, self._out, self._scalings = drafts, out, scalings
        self._next = 0  # the position to return next; 0 is the known token's

    @property
    def draft(self) -> Int[Tensor, " B"]:
        """The draft whose output is next."""
        return self._drafts[:, self._next - 1]

    @property
    def is_exhausted(self) -> bool:
        """Whether the output of every draft has been returned."""
        return self._next > self._drafts.shape[1]

    def pop(self) -> tuple[Any, Float[Tensor, "B 1 #L E"]]:
        """The model's output for the next token, with logits (B, 1, V), and its scalings."""
        place = slice(self._next, self._next + 1)
        self._next += 1
        out = copy.copy(self._out)
        out.logits = self._out.logits[:, place]
        return out, self._scalings[:, place]
