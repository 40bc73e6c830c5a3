"""What the routers share that are made from the experts' own tensors, `arrow` and `norm`.

L: adapted layers. E: experts. R: total rank of a layer. r: rank of an expert in a layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError
from loramix.experts.adapter import LoraWeights
from loramix.routers.router import LayerRouter, RouterSizes

ABSENT = -1e9
"""The logit of an expert that adds nothing in a layer: the softmax leaves it out, and a layer of such makes no NaN."""


class ExpertsRouter(LayerRouter):
    """A layer router without parameters: its tensors follow from those of the experts, which must not train.

    It has no logit for an expert that is absent from a layer, or whose A or B is 0 there: the softmax leaves it out.

    Args:
        sizes: what it is built for.

    Attributes:
        offset: (L, E): 0; for an expert that adds nothing in a layer `ABSENT`.
    """

    trains = False

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__()
        self.register_buffer("offset", torch.full((sizes.layers, sizes.experts), ABSENT))

    offset: Tensor

    @classmethod
    def check(cls, config: XLoraConfig) -> None:
        super().check(config)
        if config.use_trainable_adapters or config.new_experts:
            new = ", ".join(map(repr, config.new_experts))
            raise ConfigurationError(
                f"router={cls.kind!r} is made from the experts, which do not train.",
                received=f"new experts: {new}" if new else "use_trainable_adapters=True",
                remedy='leave it out, or use router="linear"' if not new else 'use router="linear"',
            )
        if not (config.enable_softmax or config.enable_softmax_topk):
            raise ConfigurationError(
                f"The logits of router={cls.kind!r} are made into scalings by a softmax.",
                received="enable_softmax=False without enable_softmax_topk",
                remedy="leave enable_softmax out",
            )

    def load(self, saved: Mapping[str, Tensor], replaced: Collection[int] = ()) -> None:
        """With other experts than those it was saved with, nothing is taken over: `follow` makes it anew."""
        if not replaced:
            super().load(saved)

    @torch.no_grad()
    def follow(self, experts: Sequence[Mapping[int, LoraWeights]]) -> None:
        self.offset.fill_(ABSENT)
        for layer, members in enumerate(experts):
            for expert, weights in members.items():
                down, up = weights.A.flatten(1).float(), weights.B.flatten(1).float()
                if _acts(down, up):
                    self.offset[layer, expert] = 0.0
                    self.take(layer, expert, down, up)

    @abstractmethod
    def take(self, layer: int, expert: int, A: Float[Tensor, "r n"], B: Float[Tensor, "out r"]) -> None:
        """Compute what follows from one expert's matrices in one layer; neither is 0."""


def _acts(A: Float[Tensor, "r n"], B: Float[Tensor, "out r"]) -> bool:
    """Whether B A is more than rounding: a padded rank has one of the two alone."""
    down, up = A.double(), B.double()
    largest = (torch.linalg.qr(up.T, "r").R if len(up) < len(up.T) else torch.linalg.qr(up, "r").R) @ down
    return bool(largest.norm() > 1e-9 * down.norm() * up.norm())
