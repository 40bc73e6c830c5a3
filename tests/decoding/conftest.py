"""A mixture and its base model for each architecture, made once: routed by layer, sparse, and far from the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.generation import ROUTING
from support.tiny import ARCHITECTURES, llama


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


@pytest.fixture(scope="module", params=["good drafts", "bad drafts"])
def drafts(request: pytest.FixtureRequest, model: Any) -> Any:
    """The mixture near its base model, whose drafts are mostly right, and as it is."""
    model.set_global_scaling_weight(0.02 if request.param == "good drafts" else 1.0)
    yield model
    model.set_global_scaling_weight(1.0)
