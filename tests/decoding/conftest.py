"""A mixture and its base model for each architecture, made once: routed by layer, sparse, and far from the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.tiny import ARCHITECTURES, llama

ROUTING: dict[str, Any] = {
    "layerwise_scalings": True,
    "scaling_pass_value": 0.2,
    "enable_softmax": False,
    "enable_softmax_topk": True,
    "top_k_lora": 2,
}


@pytest.fixture(scope="package", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="package")
def model(architecture: str, experts: Callable[[str], dict[str, str]]) -> Any:
    from support.mixtures import mixture

    return mixture(experts(architecture), architecture, **ROUTING)


@pytest.fixture(scope="package")
def base(architecture: str) -> Any:
    return ARCHITECTURES[architecture]()


@pytest.fixture(scope="package")
def of_llama(experts: Callable[[str], dict[str, str]]) -> Any:
    """For what does not depend on the architecture."""
    from support.mixtures import mixture

    return mixture(experts("llama"), **ROUTING)


@pytest.fixture(scope="package")
def llama_base() -> Any:
    return llama()
