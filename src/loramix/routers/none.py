"""A gating with a share for the base model alone, so that text which no expert fits need not take one.

L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.routers.gating import Gating, register_gating


@dataclass(frozen=True)
class NoneGating(Gating):
    """X-LoRA's gating over the E experts and one without matrices, which adds nothing and has no scaling: "none".

        the three steps of `Gating` over (z_1, …, z_E, none_logit); s are the first E scalings

    With a softmax the scalings sum to 1 − (none's share). None takes a place among the k that top-k keeps. Its logit
    needs no parameter: a softmax sees differences of logits only, so that a router with E logits and any biases can say
    as much as one with E + 1. Without a softmax and without top-k, none changes nothing.

    Args:
        none_logit: none's logit; the temperature divides it too. A higher one keeps the experts out more often.
    """

    none_logit: float = 0.0

    def activate(self, logits: Float[Tensor, "*tokens L E"]) -> Float[Tensor, "*tokens L E"]:
        return super().activate(_with(logits, self.none_logit))[..., :-1]

    def select(self, activated: Float[Tensor, "*tokens L E"]) -> Float[Tensor, "*tokens L E"]:
        none = 1 - activated.sum(-1, keepdim=True) if self.softmax else self.none_logit
        return super().select(_with(activated, none))[..., :-1]

    def shares(
        self, logits: Float[Tensor, "*tokens L E"], activated: Float[Tensor, "*tokens L E"]
    ) -> Float[Tensor, "*tokens L E"]:
        return activated if self.softmax else torch.softmax(_with(logits, self.none_logit), dim=-1)[..., :-1]

    def uniform(self, experts: int) -> float:
        """The logit that gives each expert the same share as none; where nothing is normalised, the scaling 1 / E."""
        return self.none_logit if self.normalised else super().uniform(experts)

    def exclusion(self, experts: int) -> float | None:
        return super().exclusion(experts + 1)


def _with(values: Float[Tensor, "*tokens E"], none: Tensor | float) -> Float[Tensor, "*tokens E_and_none"]:
    """Values of the experts, and none's behind them."""
    last = none if isinstance(none, Tensor) else values.new_full((*values.shape[:-1], 1), none)
    return torch.cat([values, last], dim=-1)


register_gating("with-none", NoneGating)
