"""A router of one linear map: how near each expert's prototype a hidden state lies.

B, S: batch, sequence. H: hidden size. L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.routers.gating import Gating, gating_of
from loramix.routers.router import HiddenStateRouter, RouterSizes, Shapes, register_router
from loramix.routers.start import LinearRouter, Method


@register_router
class PrototypeRouter(HiddenStateRouter):
    """z = scale · (W h + b), with W (E, H) and b (E) the same in all layers; scale is one, or one a layer.

    W and b are a linear discriminant of the experts' mean hidden states or ridge regression onto labels
    (`init_router`), or are trained. Built, it is the uniform mixture: W = 0, b of `Gating.uniform`, scale = 1.

    Args:
        hidden_size: H.
        distinct: 1, or L with `layerwise_scalings`.
        experts: E.
        start: every entry of b.

    Source: Fisher's linear discriminant; ridge regression (Hoerl and Kennard, 1970).
    """

    kind = "prototypes"

    def __init__(self, hidden_size: int, distinct: int, experts: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.full((experts,), start, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(distinct, dtype=torch.float32))

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        (distinct,) = cls.shapes(config, sizes)["scale"]
        return cls(sizes.hidden_size, distinct, sizes.experts, gating_of(config).uniform(sizes.experts))

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        return {
            "weight": (sizes.experts, sizes.hidden_size),
            "bias": (sizes.experts,),
            "scale": (sizes.layers if config.layerwise_scalings else 1,),
        }

    @classmethod
    def check_start(cls, config: XLoraConfig, experts: int, method: Method) -> None:
        pass

    @torch.no_grad()
    def start_uniform(self, gating: Gating) -> None:
        self.weight.zero_()
        self.bias.fill_(gating.uniform(len(self.bias)))
        self.scale.fill_(1.0)

    @torch.no_grad()
    def set_linear(self, router: LinearRouter) -> None:
        self.weight.copy_(router.weight)
        self.bias.copy_(router.bias)
        self.scale.fill_(router.scale)

    @classmethod
    def cold_expert(
        cls,
        config: XLoraConfig,
        columns: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        share: float,
        offset: float,
    ) -> dict[str, Tensor]:
        """Of layers with other scales, the one with the least decides: in the others the logit is lower still."""
        least = float(rest["scale"].min())
        if offset and least <= 0:
            raise UnsupportedOperationError(
                "A new expert of prototypes is kept low by its bias, where the scale of every layer is positive.",
                received=f"router='prototypes' with a scale of {least:.3g}",
                remedy="give the expert's tensors (column=), or fit the router again",
            )
        bias = share * columns["bias"].mean(-1) + (offset / least if offset else 0.0)
        return {"weight": share * columns["weight"].mean(-1), "bias": bias}

    def distinct(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S distinct E"]:
        if hidden.shape[-1] != self.weight.shape[-1]:
            raise ConfigurationError(
                "A router of prototypes reads hidden states of the width that it was made for.",
                received=f"hidden states {tuple(hidden.shape)} for weights {tuple(self.weight.shape)}",
                remedy=f"use the base model whose hidden size is {self.weight.shape[-1]}",
            )
        with torch.autocast(hidden.device.type, enabled=False):
            logits = nn.functional.linear(hidden.float(), self.weight, self.bias)
        return self.scale.unsqueeze(-1) * logits.unsqueeze(-2)
