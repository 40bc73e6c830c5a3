"""Distillation of a router into one that needs one pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix import ConfigurationError, DataError, PeftModel, RoutingError, XLoraConfig, get_peft_model
from loramix.passes.state import state_of
from loramix.training import distil_router
from support.tiny import llama, tokens


def teacher(experts: Any, *, sharp: float = 3.0, **config: Any) -> Any:
    """A classifier whose scalings depend on the text."""
    settings: dict[str, Any] = {"hidden_size": 64, "adapters": experts("llama"), "xlora_depth": 1, **config}
    base = llama()
    torch.manual_seed(1)
    model: Any = get_peft_model(base, XLoraConfig(**settings)).eval()
    with torch.no_grad():
        model.router.layers[0].weight.mul_(sharp)
    return model


def texts(count: int = 6) -> list[Mapping[str, Tensor]]:
    """Batches of two texts, one of them padded."""
    found = []
    for seed in range(count):
        ids = tokens(2, 24, seed=seed + 5)
        mask = torch.ones_like(ids)
        ids[0, -6:], mask[0, -6:] = 0, 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_linear_student_comes_closer_than_the_mean_teacher(layerwise: bool, experts: Any, tmp_path: Path) -> None:
    model = teacher(experts, layerwise_scalings=layerwise, softmax_temperature=0.5)
    found = distil_router(model, "linear", texts(), steps=8)
    assert model.router.kind == model.active_peft_config.router == "linear"
    assert "internal_xlora_classifier" not in dict(model.named_modules())
    assert found.divergence < found.start
    assert 0 < found.agreement <= 1
    assert not found.constant
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert state_of(model).hooks == ()
    with torch.no_grad():
        expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, expected)
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(tokens(), **greedy), model.generate(tokens(), use_cache=False, **greedy))


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_student_that_reads_the_text_comes_closer_than_a_constant(layerwise: bool, experts: Any) -> None:
    settings = XLoraConfig(adapters=experts("llama"), router="evidence", layerwise_scalings=layerwise)
    model: Any = get_peft_model(llama(), settings).eval()
    with torch.no_grad():
        model.router.weight.normal_(std=3.0)
    found = distil_router(model, "evidence", texts(40), steps=1)
    assert model.router.kind == model.active_peft_config.router == "evidence"
    assert found.closed_form is not None
    assert found.divergence < 0.7 * found.start
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert found.agreement > 0.6


def test_a_teacher_whose_layers_differ_gets_a_student_of_layers(experts: Any) -> None:
    model: Any = get_peft_model(llama(), XLoraConfig(adapters=experts("llama"), router="linear")).eval()
    with torch.no_grad():
        model.router.bias.normal_(std=2.0)
        model(tokens())
    taught = model.get_latest_scalings()
    with pytest.warns(UserWarning, match="hardly depend on the text"):
        found = distil_router(model, "evidence", texts(), steps=0)
    with torch.no_grad():
        model(tokens())
    assert found.agreement == 1
    assert_close(model.get_latest_scalings(), taught, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["evidence", "linear", "static"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_constant_teacher_is_met_exactly(kind: Any, layerwise: bool, experts: Any) -> None:
    model = teacher(experts, layerwise_scalings=layerwise, sharp=0.0)
    with torch.no_grad():
        model.router.layers[0].bias.normal_()
        expected = model(tokens()).logits
        scalings = model.get_latest_scalings()
    if kind != "static":
        with pytest.warns(UserWarning, match=r'hardly depend on the text[\s\S]*"static"'):
            found = distil_router(model, kind, texts(), steps=2)
    else:
        found = distil_router(model, kind, texts())
    assert found.constant
    assert found.divergence < 1e-6
    assert found.agreement == 1
    with torch.no_grad():
        assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    assert_close(model.get_latest_scalings(), scalings, atol=1e-4, rtol=1e-4)


def test_a_static_student_is_the_mean_teacher(experts: Any) -> None:
    model = teacher(experts, layerwise_scalings=True)
    held_out = 1
    total = []
    for batch in texts()[:-held_out]:
        with torch.no_grad():
            model(**batch)
        total.append(model.get_latest_scalings()[batch["attention_mask"].bool()])
    distil_router(model, "static", texts())
    model(tokens())
    mean = torch.cat(total).mean(0)
    assert_close(model.get_latest_scalings()[0, 0], mean, atol=1e-5, rtol=1e-5)
    assert_close(model.get_latest_scalings()[1, 3], mean, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_distilled_is_refused_and_nothing_changes(experts: Any) -> None:
    model = teacher(experts)
    before = copy.deepcopy(model.router.state_dict())
    kind: Any = "classifier"
    with pytest.raises(ConfigurationError, match="into one of evidence, linear, static"):
        distil_router(model, kind, texts())
    with pytest.raises(DataError, match="holds some out"):
        distil_router(model, "linear", texts(1))
    with model.fixed_scalings([1.0, 0.0, 0.0]), pytest.raises(RoutingError):
        distil_router(model, "linear", texts())
    hard = teacher(experts, enable_softmax=False, top_k_lora=2)
    with pytest.raises(ConfigurationError, match="scalings that a softmax makes"):
        distil_router(hard, "linear", texts())
    assert model.router.kind == hard.router.kind == "classifier"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.router.state_dict().items())


def test_settings_of_the_classifier_are_left_behind(experts: Any) -> None:
    model = teacher(experts, xlora_dropout_p=0.0, scaling_pass_value=0.1, top_k_lora=2)
    distil_router(model, "static", texts(2))
    config = model.active_peft_config
    assert (config.xlora_dropout_p, config.scaling_pass_value, config.top_k_lora) == (0.2, 0.0, 2)
    model.active_peft_config.validate()
