"""From a router's logits to scalings (docs/semantics.md §2, "Gating"; X-LoRA paper, section 2).

L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loramix._registry import Registry
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError


@dataclass(frozen=True)
class Gating:
    """X-LoRA's gating, in three steps from logits z to scalings s:

        1. a = softmax(z / temperature) over the experts with `softmax`, else a = z
        2. with `top_k`, all but the k largest entries of a become 0
        3. with `renormalise`, s = softmax of a over the entries that were kept, 0 elsewhere; else s = a

    Another gating is a subclass that overrides `activate`, `select` or both, and what `uniform` and `exclusion` say
    where they are then wrong; it is registered by name (`register_gating`), which `XLoraConfig.gating` gives. Fields
    that it adds, each with a default, are its settings (`XLoraConfig.gating_settings`).

    Args:
        softmax: whether step 1 is a softmax (`enable_softmax`).
        temperature: its temperature, positive (`softmax_temperature`).
        top_k: entries that step 2 keeps; None keeps all (`top_k_lora`).
        renormalise: whether step 3 is a softmax (`enable_softmax_topk`); the temperature is not used there.
    """

    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    renormalise: bool = False

    @classmethod
    def from_config(cls, config: XLoraConfig) -> Self:
        """The gating that a configuration describes."""
        return cls(
            softmax=config.enable_softmax,
            temperature=float(config.softmax_temperature),
            top_k=config.top_k_lora,
            renormalise=config.enable_softmax_topk,
            **config.gating_settings,
        )

    def activate(self, logits: Float[Tensor, "*tokens L E"]) -> Float[Tensor, "*tokens L E"]:
        """Step 1: what `get_latest_scalings()` and the scalings log show."""
        if not self.softmax:
            return logits
        return torch.softmax(logits if self.temperature == 1.0 else logits / self.temperature, dim=-1)

    def select(self, activated: Float[Tensor, "*tokens L E"]) -> Float[Tensor, "*tokens L E"]:
        """Steps 2 and 3. Entries are kept by index, never by value: a selected scaling of exactly 0 stays selected."""
        if self.top_k is None or self.top_k >= activated.shape[-1]:
            return torch.softmax(activated, dim=-1) if self.renormalise else activated
        kept = largest(activated, self.top_k)
        if self.renormalise:
            return torch.softmax(activated.masked_fill(~kept, -torch.inf), dim=-1)
        return activated.masked_fill(~kept, 0.0)

    @property
    def normalised(self) -> bool:
        """Whether a softmax makes the scalings: they are positive and sum to 1."""
        return self.softmax or self.renormalise

    def shares(
        self, logits: Float[Tensor, "*tokens L E"], activated: Float[Tensor, "*tokens L E"]
    ) -> Float[Tensor, "*tokens L E"]:
        """What step 1 made of these logits, as probabilities over the experts."""
        return activated if self.softmax else torch.softmax(logits, dim=-1)

    def uniform(self, experts: int) -> float:
        """The logit that, given to each of so many experts, gives each the scaling 1 / E."""
        return 0.0 if self.normalised else 1 / experts

    def exclusion(self, experts: int) -> float | None:
        """The logit that gives one of so many experts the scaling 0; None where each has a positive one."""
        by_rank = self.top_k is not None and self.top_k < experts
        if self.softmax and self.renormalise and not by_rank:
            return None
        return -math.inf if self.normalised or by_rank else 0.0

    def cold(self, experts: int) -> tuple[float, float] | None:
        """A finite logit for one more expert beside so many, with which it adds nothing beyond rounding.

        Returns:
            (share, offset): the logit is share · (mean logit of the others) + offset. The largest logit is never below
            the mean, so a softmax gives at most exp(offset / temperature) whatever the text. None where each expert has
            a positive scaling.
        """
        if self.exclusion(experts + 1) is None:
            return None
        by_rank = self.top_k is not None
        if not (self.normalised or by_rank):
            return 0.0, 0.0
        return 1.0, -(_LAST if by_rank else _UNSEEN) * (self.temperature if self.softmax else 1.0)


def largest(scalings: Float[Tensor, "*tokens E"], k: int) -> Bool[Tensor, "*tokens E"]:
    """True at exactly the `k` largest entries of the last dimension, ties broken as `torch.topk` breaks them."""
    chosen = scalings.topk(k, dim=-1).indices
    return torch.zeros_like(scalings, dtype=torch.bool).scatter(-1, chosen, True)


_UNSEEN = 20.0
"""exp(−20) = 2e-9 is below half a unit in the last place of float32, 6e-8."""
_LAST = 1e4
"""Below logits that are ranked, too."""
_GATINGS = Registry[type[Gating]]("gating", "loramix.routers.register_gating")
_GATINGS.add("xlora", Gating)


def register_gating(name: str, kind: type[Gating]) -> None:
    """Let `XLoraConfig.gating` name a gating of another package.

    Raises:
        ConfigurationError: the name is taken by another class.
    """
    _GATINGS.add(name, kind)


def gating_of(config: XLoraConfig) -> Gating:
    """The gating of a mixture, as its live configuration describes it.

    Raises:
        ConfigurationError: `config.gating` names none that is registered, or `config.gating_settings` has a setting
            that it does not know.
    """
    kind = _GATINGS[config.gating]
    unknown = [name for name in config.gating_settings if name not in _own_settings(kind)]
    if unknown:
        raise ConfigurationError(
            f"gating_settings of gating={config.gating!r} are {', '.join(_own_settings(kind)) or 'none'}.",
            received=f"gating_settings={config.gating_settings!r}",
            remedy=f"correct {', '.join(unknown)}, or leave it out",
        )
    return kind.from_config(config)


def _own_settings(kind: type[Gating]) -> list[str]:
    return [entry.name for entry in fields(kind) if entry.name not in Gating.__dataclass_fields__]
