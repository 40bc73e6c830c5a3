"""Mixtures whose routing differs from token to token, and what one forward makes of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import attach
from support.mixtures import SPARSE, mixture


class _Final(RoutingHook):
    def __init__(self) -> None:
        self.final = torch.empty(0)

    def routed(self, output: RouterOutput) -> None:
        self.final = output.final.detach()


@pytest.fixture(scope="package")
def direct() -> Callable[[Any, Sequence[int] | Tensor], Tensor]:
    """The final scalings (S, L, E) of one forward over one text, without a cache and without a record."""

    @torch.no_grad()
    def run(model: Any, ids: Sequence[int] | Tensor) -> Tensor:
        hook = _Final()
        detach = attach(model, hook)
        model(torch.as_tensor(ids)[None], use_cache=False)
        detach()
        return hook.final[0]

    return run


@pytest.fixture(scope="package")
def routed(experts: Callable[[str], dict[str, str]]) -> Any:
    """Each layer routes by itself, two of three experts a token."""
    return mixture(experts("llama"), layerwise_scalings=True, scaling_pass_value=0.2, **SPARSE)


@pytest.fixture(scope="package")
def shared(experts: Callable[[str], dict[str, str]]) -> Any:
    """All layers share a dense routing."""
    return mixture(experts("llama"))
