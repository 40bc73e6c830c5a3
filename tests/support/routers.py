"""Routers of another package, one of each family, and what sees their output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loramix import XLoraConfig
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.routers import HiddenStateRouter, LayerRouter, RouterSizes, register_router


@register_router
class PlainRouter(HiddenStateRouter):
    """z = W h, for each layer with `layerwise_scalings`."""

    kind = "test-plain"

    def __init__(self, hidden_size: int, distinct: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(distinct, experts, hidden_size) / hidden_size**0.5)

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        return cls(sizes.hidden_size, sizes.layers if config.layerwise_scalings else 1, sizes.experts)

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> dict[str, tuple[int, ...]]:
        return {"weight": (sizes.layers if config.layerwise_scalings else 1, sizes.experts, sizes.hidden_size)}

    def distinct(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S distinct E"]:
        return torch.einsum("bsh,leh->bsle", hidden.float(), self.weight)


@register_router
class EnergyRouter(LayerRouter):
    """z_{l,e} = w_e · log(1 + ‖h_{l,e}‖²): how much of x each expert's A takes in."""

    kind = "test-energy"

    def __init__(self, expert_of_rank: tuple[tuple[int, ...], ...], experts: int) -> None:
        super().__init__()
        self.expert_of_rank, self.experts = expert_of_rank, experts
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, experts))

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        return cls(sizes.expert_of_rank, sizes.experts)

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> dict[str, tuple[int, ...]]:
        return {"scale": (sizes.experts,)}

    @classmethod
    def describe(cls, config: XLoraConfig) -> Mapping[str, Any]:
        return {"reads": "energy"}

    def layer_logits(self, layer: int, low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens E"]:
        expert = torch.tensor(self.expert_of_rank[layer])
        energy = low_rank.new_zeros(*low_rank.shape[:-1], self.experts).index_add(-1, expert, low_rank.square())
        return self.scale * torch.log1p(energy)


class Seen(RoutingHook):
    """Keeps what each forward made."""

    def __init__(self) -> None:
        self.outputs: list[RouterOutput] = []

    def routed(self, output: RouterOutput) -> None:
        self.outputs.append(output)
