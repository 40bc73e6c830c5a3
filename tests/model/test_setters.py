"""What can be changed while a mixture runs: its own copy, from the next forward on, and saved."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loramix import ConfigurationError, PeftModel, XLoraConfig, get_peft_model
from loramix.passes.scalings_log import ScalingsLog
from loramix.passes.state import state_of
from support.mixtures import final_scalings, logits_of
from support.tiny import llama, tokens
from support.usages import Adapters, build, scalings

CHANGES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "top-k": ("set_topk_lora", 1, {"top_k_lora": 1}),
    "weight": ("set_global_scaling_weight", 0.25, {"global_scaling_weight": 0.25}),
    "pass value": ("set_scaling_pass_value", 0.7, {"scaling_pass_value": 0.7}),
    "pass value of None": ("set_scaling_pass_value", None, {"scaling_pass_value": 1 / 3}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_counts_from_the_next_forward_and_is_saved(change: str, adapters: Adapters, tmp_path: Path) -> None:
    setter, value, fields = CHANGES[change]
    model = build(adapters)
    before = logits_of(model)
    getattr(model, setter)(value)
    after = logits_of(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits_of(build(adapters, **fields)))
    for config in (model.peft_config["default"], model.internal_xlora_classifier.config):
        assert {name: getattr(config, name) for name in fields} == fields
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path)), after)


def test_top_k_can_be_taken_back(adapters: Adapters) -> None:
    model = build(adapters)
    dense = logits_of(model)
    model.set_topk_lora(2)
    assert (final_scalings(model) == 0).any()
    model.set_topk_lora(None)
    assert torch.equal(logits_of(model), dense)


def test_the_scaling_pass_is_not_gated(adapters: Adapters) -> None:
    """With top-k and a value for all experts, the router reads what all of them together produce."""
    dense, sparse = (build(adapters, scaling_pass_value=0.5, **top_k) for top_k in ({}, {"top_k_lora": 1}))
    assert torch.equal(scalings(dense), scalings(sparse))
    assert not torch.equal(logits_of(dense), logits_of(sparse))


def test_the_callers_configuration_and_other_models_stay_as_they_were(adapters: Adapters) -> None:
    config = XLoraConfig(hidden_size=64, adapters=adapters(3))
    before = config.to_dict()
    one: Any = get_peft_model(llama(), config)
    other: Any = get_peft_model(llama(), config)
    one.set_topk_lora(1)
    one.set_global_scaling_weight(3.0)
    assert config.to_dict() == before
    assert other.peft_config["default"].top_k_lora is None
    assert other.get_global_scaling_weight() == 1.0


def test_a_field_of_the_live_configuration_counts_too(adapters: Adapters) -> None:
    model = build(adapters)
    model.internal_xlora_classifier.config.softmax_temperature = 0.5
    assert torch.equal(logits_of(model), logits_of(build(adapters, softmax_temperature=0.5)))


@pytest.mark.parametrize(
    ("setter", "value"),
    [
        ("set_topk_lora", 0),
        ("set_topk_lora", -1),
        ("set_topk_lora", 4),
        ("set_topk_lora", 1.5),
        ("set_topk_lora", True),
        ("set_global_scaling_weight", math.nan),
        ("set_global_scaling_weight", math.inf),
        ("set_global_scaling_weight", "1"),
        ("set_scaling_pass_value", math.nan),
        ("set_scaling_pass_value", "0.5"),
    ],
)
def test_a_wrong_value_raises_and_changes_nothing(setter: str, value: Any, adapters: Adapters) -> None:
    model = build(adapters)
    config, before = model.peft_config["default"].to_dict(), logits_of(model)
    field = {"set_topk_lora": "top_k_lora"}.get(setter, setter.removeprefix("set_"))
    # Unwrapped: for users nobody checks the types before the rule does.
    with pytest.raises(ConfigurationError) as caught:
        inspect.unwrap(getattr(type(model), setter))(model, value)
    assert field in caught.value.rule
    assert f"{field}={value!r}" in caught.value.received
    assert caught.value.remedy
    assert model.peft_config["default"].to_dict() == config
    assert torch.equal(logits_of(model), before)


def test_the_log_is_bounded_detached_and_bucketed(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(adapters).train()
    layers = len(model.adapted_modules)
    model(tokens())
    assert model.get_scalings_log() == []
    model.enable_scalings_logging()
    for length in (3, 5, 3):
        model(tokens(2, length))
    log = model.get_scalings_log()
    assert [tuple(entry.shape) for entry in log] == [(2, s, layers, 3) for s in (3, 5, 3)]
    assert not any(entry.requires_grad or entry.grad_fn for entry in log)
    assert all(entry.device.type == "cpu" for entry in log)
    assert torch.equal(log[-1], model.get_latest_scalings())
    buckets = model.get_bucketed_scalings_log()
    assert {s: positions for s, (positions, _) in buckets.items()} == {3: [0, 2], 5: [1]}
    assert torch.equal(buckets[5][1][0], log[1])

    log.clear()
    model.disable_scalings_logging()
    model(tokens())
    assert len(model.get_scalings_log()) == 3
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    state_of(model).log = ScalingsLog(capacity=2)
    model.enable_scalings_logging()
    for _ in range(3):
        model(tokens())
    assert len(model.get_scalings_log()) == 2
