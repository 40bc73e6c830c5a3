"""The router and what trains are float32 beside a base model of any dtype; what comes out has the base's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from support.mixtures import far, logits_of, mixture
from support.tiny import llama, tokens

Experts = Callable[[str], dict[str, str]]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def low(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_beside_a_low_precision_base_the_router_is_float32(low: torch.dtype, experts: Experts) -> None:
    model = mixture(experts("llama"), base=llama().to(low))
    assert dtypes(model.internal_xlora_classifier) == {torch.float32}
    assert expert_dtypes(model) == {low}
    assert logits_of(model).dtype == low
    assert model.get_latest_scalings().dtype == torch.float32
    assert_close(logits_of(model).float(), logits_of(mixture(experts("llama"))), atol=0.1, rtol=0.1)
    with model.disable_adapter():
        plain = logits_of(model)
    assert far(plain, logits_of(model))


def test_experts_that_train_are_float32(low: torch.dtype, experts: Experts) -> None:
    model = mixture(experts("llama"), base=llama().to(low), use_trainable_adapters=True).train()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert expert_dtypes(model) == {torch.float32}
    assert out.logits.dtype == low
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert all(g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("experts_train", [False, True])
def test_casting_the_model_leaves_router_scales_and_trained_experts(
    experts_train: bool, low: torch.dtype, experts: Experts
) -> None:
    model = mixture(experts("llama"), use_trainable_adapters=experts_train)
    expected = logits_of(model)
    model(tokens(), labels=tokens()).loss.backward()
    model.to(low)
    assert dtypes(model.internal_xlora_classifier) == {torch.float32}
    assert expert_dtypes(model) == {torch.float32 if experts_train else low}
    assert {model.get_submodule(path).stack.rank_scale.dtype for path in model.adapted_modules} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == low
    assert logits_of(model).dtype == low
    assert_close(logits_of(model).float(), expected, atol=0.1, rtol=0.1)


def test_under_autocast_the_router_computes_in_float32(experts: Experts) -> None:
    model = mixture(experts("llama"), use_trainable_adapters=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert model.get_latest_scalings().dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_close(out.logits.float(), logits_of(model), atol=0.1, rtol=0.1)


def test_the_default_dtype_does_not_reach_router_and_scales(experts: Experts) -> None:
    base, expected = llama(), logits_of(mixture(experts("llama")))
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = mixture(experts("llama"), base=base)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {model.get_submodule(path).stack.rank_scale.dtype for path in model.adapted_modules} == {torch.float32}
    assert dtypes(model.internal_xlora_classifier) == {torch.float32}
    assert_close(logits_of(model), expected, atol=1e-2, rtol=1e-2)


def test_a_double_precision_base_works(experts: Experts) -> None:
    model = mixture(experts("llama"), base=llama().double())
    assert_close(logits_of(model).float(), logits_of(mixture(experts("llama"))), atol=1e-4, rtol=1e-4)
    assert logits_of(model).dtype == torch.float64


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def expert_dtypes(model: Any) -> set[torch.dtype]:
    return {p.dtype for path in model.adapted_modules for p in model.get_submodule(path).stack.parameters()}
