"""Scalings that are the same for every token: one logit for each expert, or for each layer and expert.

L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, RoutingError
from loramix.routers.gating import Gating, gating_of
from loramix.routers.router import ConstantRouter, RouterSizes, Shapes, register_router
from loramix.routers.start import ClosedForm, LinearRouter, Method, Moments


@register_router
class StaticRouter(ConstantRouter):
    """z = b, with b (E), or (L, E) with `layerwise_scalings`; given (`assign`) or trained.

    Without softmax, b are the scalings themselves. It starts at the uniform mixture (`Gating.uniform`).

    Args:
        distinct: 1, or L.
        experts: E.
        start: every entry of b.

    Source: LoRA soups, arXiv 2410.13025.
    """

    kind = "static"

    def __init__(self, distinct: int, experts: int, start: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((distinct, experts), start, dtype=torch.float32))

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        return cls(*cls.shapes(config, sizes)["logits"], start=gating_of(config).uniform(sizes.experts))

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        return {"logits": (sizes.layers if config.layerwise_scalings else 1, sizes.experts)}

    @classmethod
    def check_start(cls, config: XLoraConfig, experts: int, method: Method) -> None:
        if method == "prompts":
            raise ConfigurationError(
                "A static router starts from the experts' shares of labelled text, which prompts do not tell.",
                received='method="prompts" for router="static"',
                remedy='use method="labels" or "zeros", or set the weights with router.assign(…)',
            )

    @torch.no_grad()
    def start_uniform(self, gating: Gating) -> None:
        self.logits.fill_(gating.uniform(self.logits.shape[-1]))

    def start_from(self, moments: Sequence[Moments], method: ClosedForm, gating: Gating) -> LinearRouter:
        """The experts' scalings have the proportions of their shares of the labelled tokens."""
        counts = moments[0].counts
        shares = (counts / counts.sum()).float()
        temperature = gating.temperature if gating.softmax else 1.0
        logits = temperature * shares.log() if gating.normalised else shares
        self.assign(logits)
        return LinearRouter(shares.new_zeros(len(shares), 0), logits, 1.0, float(shares.max()))

    @classmethod
    def cold_expert(
        cls,
        config: XLoraConfig,
        columns: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        share: float,
        offset: float,
    ) -> dict[str, Tensor]:
        return {"logits": share * columns["logits"].mean(-1) + offset}

    def constant_logits(self) -> Float[Tensor, "distinct E"]:
        return self.logits

    @torch.no_grad()
    def assign(self, values: Any) -> None:
        """Set b.

        Args:
            values: numbers, as a tensor or nested lists: (E,), or (L, E) with `layerwise_scalings`; one row is taken
                for all layers.

        Raises:
            RoutingError: another shape, or a number that is not finite.
        """
        expected = tuple(self.logits.shape)
        try:
            given = torch.as_tensor(values, dtype=torch.float32).to(self.logits.device)
            new = given.expand(expected) if given.dim() in (1, 2) else None
        except (TypeError, ValueError, RuntimeError):
            new = None
        if new is None or not bool(torch.isfinite(new).all()):
            raise RoutingError(
                "A static router holds one finite logit for each expert, or for each layer and expert.",
                received=f"{values!r}",
                remedy=f"pass shape ({expected[1]},)" + (f" or {expected}" if expected[0] > 1 else ""),
            )
        self.logits.copy_(new)
