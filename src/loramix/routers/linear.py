"""A linear map of each layer's low-rank activation: trained, distilled, or fitted to labelled text.

L: adapted layers. E: experts. R: total rank of a layer; ΣR over the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loramix.config.xlora import XLoraConfig
from loramix.routers.gating import Gating, gating_of
from loramix.routers.router import LayerRouter, RouterSizes, Shapes, register_router
from loramix.routers.start import Method


@register_router
class LinearRouter(LayerRouter):
    """z_l = W_l · h_l / rms(h_l) + b_l, with rms(h) = √(mean of h²).

    It starts at the uniform mixture: W = 0, and b as `Gating.uniform` says. The logit of an expert depends on the
    activations of all experts.

    Args:
        ranks: R of each layer.
        experts: E.
        start: every entry of b.

    Attributes:
        weight: (E, ΣR): W of one layer after the other.
        bias: (L, E): b.

    Source: loramix's own; the normalisation is that of RMSNorm, arXiv 1910.07467.
    """

    kind = "linear"

    def __init__(self, ranks: tuple[int, ...], experts: int, start: float) -> None:
        super().__init__()
        self._ranks, self._ends = ranks, (0, *accumulate(ranks))
        self.weight = nn.Parameter(torch.zeros(experts, self._ends[-1]))
        self.bias = nn.Parameter(torch.full((len(ranks), experts), start))

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        return cls(tuple(map(len, sizes.expert_of_rank)), sizes.experts, gating_of(config).uniform(sizes.experts))

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        ranks = sum(map(len, sizes.expert_of_rank))
        return {"weight": (sizes.experts, ranks), "bias": (sizes.layers, sizes.experts)}

    @classmethod
    def check_start(cls, config: XLoraConfig, experts: int, method: Method) -> None:
        pass

    @torch.no_grad()
    def start_uniform(self, gating: Gating) -> None:
        self.weight.zero_()
        self.bias.fill_(gating.uniform(self.bias.shape[-1]))

    def layer_logits(self, layer: int, low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens E"]:
        return F.linear(normalised(low_rank), self.layer_weight(layer), self.bias[layer])

    def for_pass(self) -> Callable[[int, Tensor], Tensor]:
        """The same, scaled after the product: √R (W h) / √(‖h‖² + R ε) + b."""
        weight, bias = self.weight.split(self._ranks, dim=1), self.bias.unbind()
        least = {ranks: self.weight.new_tensor((ranks * _EPSILON) ** 0.5) for ranks in {*self._ranks}}

        def logits(layer: int, low_rank: Tensor) -> Tensor:
            ranks = self._ranks[layer]
            length = torch.hypot(torch.linalg.vector_norm(low_rank, dim=-1, keepdim=True), least[ranks])
            return torch.addcdiv(bias[layer], F.linear(low_rank, weight[layer]), length, value=ranks**0.5)

        return logits

    def layer_weight(self, layer: int) -> Float[Tensor, "E R"]:
        """W of one layer: a view."""
        return self.weight[:, self._ends[layer] : self._ends[layer + 1]]

    @torch.no_grad()
    def assign(self, layer: int, weight: Float[Tensor, "E R"], bias: Float[Tensor, " E"]) -> None:
        """Set W and b of one layer."""
        self.layer_weight(layer).copy_(weight)
        self.bias[layer].copy_(bias)


_EPSILON = torch.finfo(torch.float32).eps
"""What `F.rms_norm` adds to the mean of h²."""


def normalised(low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens R"]:
    """h / rms(h); 0 where h is 0."""
    return F.rms_norm(low_rank, low_rank.shape[-1:])
