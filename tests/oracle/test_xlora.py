"""Logits and scalings equal PEFT's X-LoRA on the same files and router, for each path through the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from support.disk import edited
from support.peft_side import PEFT_WARNINGS, ours, xlora
from support.tiny import ARCHITECTURES, llama, tokens

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

Folders = Callable[[str, str], tuple[str, ...]]

SPARSE = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}
HARD = {"enable_softmax": False, "top_k_lora": 2}
# each: the configuration, and its nearest neighbour with the same router, from which it must differ
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "dense": ({}, {"enable_softmax": False}),
    "dense top-k": ({"top_k_lora": 1}, {}),
    "sparse": (SPARSE, HARD),
    "hard": (HARD, SPARSE),
    "raw": ({"enable_softmax": False}, HARD),
    "layerwise": ({"layerwise_scalings": True}, None),
    "layerwise sparse": ({"layerwise_scalings": True, **SPARSE}, {"layerwise_scalings": True, **HARD}),
    "depth 3": ({"xlora_depth": 3, "xlora_size": 32}, None),
    "depth 3 layerwise": ({"xlora_depth": 3, "xlora_size": 32, "layerwise_scalings": True}, None),
    "depth 3 without dropout": ({"xlora_depth": 3, "xlora_size": 32, "xlora_dropout_p": 0.0}, None),
    "scaling pass": ({"scaling_pass_value": 0.5}, {}),
    "global weight": ({"global_scaling_weight": 0.5}, {}),
    "both": (
        {"scaling_pass_value": 0.5, "global_scaling_weight": 0.5},
        {"scaling_pass_value": 0.25, "global_scaling_weight": 0.5},
    ),
    "temperature": ({"softmax_temperature": 0.5}, {}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_equals_pefts(name: str, folders: Folders) -> None:
    config, neighbour = CONFIGURATIONS[name]
    experts = folders("llama", "ranks")
    theirs = xlora(llama(), experts, **config)
    model = ours(llama(), experts, like=theirs, **config)
    logits = assert_equal(model, theirs)
    if neighbour is not None:
        assert_far(ours(llama(), experts, like=theirs, **neighbour), logits)
    layers = model.get_latest_scalings()
    assert torch.equal(layers[:, :, 0], layers[:, :, 1]) is not config.get("layerwise_scalings", False)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_an_architecture_equals_pefts(architecture: str, folders: Folders) -> None:
    experts, base = folders(architecture, "ranks"), ARCHITECTURES[architecture]
    theirs = xlora(base(), experts, layerwise_scalings=True)
    assert_equal(ours(base(), experts, like=theirs, layerwise_scalings=True), theirs)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_experts_of_the_embedding_equal_pefts(architecture: str, folders: Folders) -> None:
    experts, base = folders(architecture, "embedding"), ARCHITECTURES[architecture]
    theirs = xlora(base(), experts, layerwise_scalings=True, scaling_pass_value=0.5)
    model = ours(base(), experts, like=theirs, layerwise_scalings=True, scaling_pass_value=0.5)
    assert_equal(model, theirs)
    with model.disable_adapter():
        logits = logits_of(model)
    with model.fixed_scalings([0.0, 1.0]):  # the expert that adapts nothing but the embedding
        assert_far(model, logits)


def test_experts_of_different_modules_ranks_and_scales_equal_pefts(folders: Folders) -> None:
    experts = folders("llama", "ragged")
    theirs = xlora(llama(), experts, layerwise_scalings=True)
    model = ours(llama(), experts, like=theirs, layerwise_scalings=True)
    assert_equal(model, theirs)
    ranks = {tuple(layer.stack.ranks) for layer in map(model.get_submodule, model.adapted_modules)}
    assert ranks >= {(4,), (4, 4), (6,), (6, 4)}


@pytest.mark.parametrize(
    ("expert", "field", "value"),
    [(0, "use_rslora", False), (0, "lora_alpha", 9), (1, "alpha_pattern", {})],
)
def test_each_setting_of_a_scale_counts(
    expert: int, field: str, value: object, folders: Folders, tmp_path: Path
) -> None:
    experts = list(folders("llama", "ragged"))
    logits = logits_of(ours(llama(), experts), uniform=True)
    experts[expert] = str(edited(experts[expert], tmp_path / "edited", **{field: value}))
    assert (logits_of(ours(llama(), experts), uniform=True) - logits).abs().max() > 1e-3


def test_a_left_padded_batch_equals_pefts(folders: Folders) -> None:
    experts = folders("llama", "ranks")
    theirs = xlora(llama(), experts)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    real = mask.bool()
    got = ours(llama(), experts, like=theirs)(tokens(), attention_mask=mask).logits.detach()
    assert_close(got[real], theirs(tokens(), attention_mask=mask).logits.detach()[real], atol=1e-5, rtol=1e-5)
    assert (got - logits_of(theirs))[real].abs().max() > 1e-3


@pytest.mark.parametrize("config", [{}, SPARSE, {"layerwise_scalings": True, **HARD}], ids=["dense", "sparse", "hard"])
def test_the_gradients_of_router_and_experts_equal_pefts(config: dict[str, Any], folders: Folders) -> None:
    experts = folders("llama", "ragged")
    settings = {"use_trainable_adapters": True, "scaling_pass_value": 0.5 if config == {} else 0.0, **config}
    theirs = xlora(llama(), experts, **settings).train()
    model = ours(llama(), experts, like=theirs, **settings).train()
    for each in (model, theirs):
        each(tokens(), labels=tokens(seed=2)).loss.backward()

    router = theirs.base_model.internal_xlora_classifier.layers
    for got, expected in zip(model.internal_xlora_classifier.layers.parameters(), router.parameters(), strict=True):
        assert expected.grad.abs().max() > 1e-4
        assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-5)
    for path in model.adapted_modules:
        layer, other = model.get_submodule(path), theirs.base_model.lora_model.model.get_submodule(path)
        for e, grads in layer.stack.unstack({name: p.grad for name, p in layer.stack.named_parameters()}).items():
            assert_close(grads.A, other.lora_A[str(e)].weight.grad, atol=1e-5, rtol=1e-5)
            assert_close(grads.B, other.lora_B[str(e)].weight.grad, atol=1e-5, rtol=1e-5)


def assert_equal(model: Any, theirs: Any) -> torch.Tensor:
    """Logits and scalings agree, and they are neither the base model's nor uniform."""
    got, expected = logits_of(model), logits_of(theirs)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    scalings = theirs.base_model.internal_xlora_scalings.detach()
    assert_close(model.get_latest_scalings(), scalings, atol=1e-5, rtol=1e-5)
    assert (scalings.amax(-1) - scalings.amin(-1)).mean() > 0.2
    with model.disable_adapter():
        assert_far(model, got)
    return got


def assert_far(model: Any, logits: torch.Tensor) -> None:
    assert (logits_of(model) - logits).abs().max() > 1e-3


@torch.no_grad()
def logits_of(model: Any, uniform: bool = False) -> torch.Tensor:
    if not uniform:
        return model(tokens()).logits
    with model.fixed_scalings([1.0] * len(model.expert_names)):
        return model(tokens()).logits
