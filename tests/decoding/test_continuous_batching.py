"""Continuous batching pages one cache: a mixture that routes each token is refused, not decoded wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loramix import UnsupportedOperationError
from support.mixtures import mixture
from support.tiny import tokens


def test_a_mixture_that_routes_is_refused(experts: Callable[[str], dict[str, str]]) -> None:
    model = mixture(experts("llama"))
    for call in (lambda: model.generate_batch(inputs=tokens(2).tolist()), model.init_continuous_batching):
        with pytest.raises(UnsupportedOperationError, match="pages one cache"):
            call()


def test_a_fixed_routing_is_not(experts: Callable[[str], dict[str, str]]) -> None:
    model = mixture(experts("llama"))
    with model.fixed_scalings([1.0, 0.0, 0.0]):
        assert model.init_continuous_batching() is not None
