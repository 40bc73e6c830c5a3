"""Every usage of the configuration as users write it: build, run, generate, save, load; and its effect shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from loramix import PeftModel, XLoraConfig, XLoraModel, get_peft_model
from support.mixtures import final_scalings, logits_of
from support.tiny import llama, save_experts, tokens
from support.usages import USAGES, Adapters, build, generated, scalings


@pytest.mark.parametrize("usage", USAGES)
def test_built_run_saved_and_loaded_it_is_the_same(usage: str, adapters: Adapters, tmp_path: Path) -> None:
    model = build(adapters, usage)
    count, settings = USAGES[usage]
    expected, text, routing = logits_of(model), generated(model), scalings(model)
    assert routing.shape == (2, 9, len(model.adapted_modules), count)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert isinstance(loaded, XLoraModel)
    assert torch.equal(logits_of(loaded), expected)
    assert torch.equal(scalings(loaded), routing)
    assert torch.equal(generated(loaded), text)
    assert loaded.expert_names == list(adapters(count))
    read_back = loaded.peft_config["default"]
    assert {name: getattr(read_back, name) for name in settings} == settings
    assert not torch.equal(expected, logits_of(llama()))


def test_every_usage_computes_something_else(adapters: Adapters) -> None:
    same = {"shared": "shallow", "trainable experts": "shallow"}
    found = {usage: logits_of(build(adapters, usage)) for usage in USAGES}
    for usage, one in found.items():
        equal = [other for other in found if torch.equal(found[other], one)]
        assert {same.get(other, other) for other in equal} == {same.get(usage, usage)}


def test_the_classifier_has_the_depth_that_was_asked_for(adapters: Adapters) -> None:
    for usage, depth in {"shallow": 1, "basic": 2, "everything": 3, "deep": 4}.items():
        layers = build(adapters, usage).internal_xlora_classifier.layers
        assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Dropout] * (depth - 1) + [nn.Linear]
        assert all(layer.p == USAGES[usage][1].get("xlora_dropout_p", 0.2) for layer in layers[2::3])


@pytest.mark.parametrize(("usage", "kept"), [("sparse", 2), ("hard top-k", 2), ("dense top-k", 1), ("shallow", 3)])
def test_top_k_leaves_exactly_k(adapters: Adapters, usage: str, kept: int) -> None:
    final = final_scalings(build(adapters, usage))
    assert torch.equal((final != 0).sum(-1), torch.full(final.shape[:-1], kept))


def test_the_softmax_over_the_kept_sums_to_one_and_nothing_is_renormalised_elsewhere(adapters: Adapters) -> None:
    sums = {usage: final_scalings(build(adapters, usage)).sum(-1) for usage in ("sparse", "dense top-k", "shallow")}
    assert_close(sums["sparse"], torch.ones_like(sums["sparse"]))
    assert_close(sums["shallow"], torch.ones_like(sums["shallow"]))
    assert (sums["dense top-k"] < 0.999).any()


def test_the_kept_are_the_largest(adapters: Adapters) -> None:
    model = build(adapters, "hard top-k")
    final, before = final_scalings(model), model.get_latest_scalings()
    smallest = before[..., :1, :].argmin(-1)
    assert torch.equal((final == 0).nonzero()[:, -1], smallest.flatten())
    assert torch.equal(final[final != 0], before[..., :1, :][final != 0])


def test_temperature_sharpens_and_softens(adapters: Adapters) -> None:
    entropy = [
        torch.special.entr(scalings(build(adapters, softmax_temperature=temperature))).sum(-1)
        for temperature in (0.5, 1.0, 2.0)
    ]
    assert (entropy[0] < entropy[1]).all()
    assert (entropy[1] < entropy[2]).all()


def test_layerwise_scalings_differ_by_layer_and_shared_ones_do_not(adapters: Adapters) -> None:
    layerwise, shared = scalings(build(adapters, "layerwise")), scalings(build(adapters, "shared"))
    assert all(not torch.equal(layerwise[:, :, 0], layerwise[:, :, layer]) for layer in range(1, layerwise.shape[2]))
    assert torch.equal(shared, shared[:, :, :1].expand_as(shared))


@pytest.mark.parametrize("trains", [True, False])
def test_trainable_experts_get_gradients(adapters: Adapters, trains: bool) -> None:
    model = build(adapters, use_trainable_adapters=trains).train()
    model(tokens(), labels=tokens()).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("internal_xlora_classifier" in name for name in with_gradient)
    expected = {f"{path}.stacks.0.lora_{part}" for path in model.adapted_modules for part in "AB"} if trains else set()
    assert {name for name in with_gradient if "internal_xlora_classifier" not in name} == expected


def test_the_global_weight_scales_what_the_experts_add(adapters: Adapters) -> None:
    half, whole = build(adapters, "half weight"), build(adapters)
    assert half.get_global_scaling_weight() == 0.5
    with half.fixed_scalings([1.0, 0.4, 0.2]), whole.fixed_scalings([0.5, 0.2, 0.1]):
        assert_close(logits_of(half), logits_of(whole))
    assert torch.equal(scalings(half), scalings(whole))


def test_the_scaling_pass_value_is_every_experts_in_the_scaling_pass(adapters: Adapters) -> None:
    model = build(adapters, "scaling pass value")
    with torch.no_grad(), model.fixed_scalings([0.333] * 3):
        hidden = model.model(tokens()).last_hidden_state
        expected = model.internal_xlora_classifier(hidden).softmax(-1)
    assert_close(scalings(model), expected)
    assert not torch.allclose(expected, scalings(build(adapters)), atol=1e-3)


def test_new_adapters_replace_the_saved_ones(adapters: Adapters, tmp_path: Path) -> None:
    model = build(lambda _: adapters(2))
    model.save_pretrained(tmp_path / "mixture")
    checkpoint = tmp_path / "mixture"
    new = save_experts(
        tmp_path, "llama", ("other", "new_adapter1", "new_adapter2"), target_modules=["q_proj", "v_proj"]
    )
    new.pop("other")
    base = llama()
    loaded: Any = PeftModel.from_pretrained(base, checkpoint, adapters=new)
    assert loaded.expert_names == ["new_adapter1", "new_adapter2"]
    assert loaded.peft_config["default"].adapters == new
    assert_same_router(loaded, model)

    torch.manual_seed(4)
    expected: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=new)).eval()
    expected.internal_xlora_classifier.load_state_dict(model.internal_xlora_classifier.state_dict())
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert torch.equal(generated(loaded), generated(expected))
    assert not torch.equal(logits_of(loaded), logits_of(model))

    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path / "again")), logits_of(expected))


def assert_same_router(one: Any, other: Any) -> None:
    states = (model.internal_xlora_classifier.state_dict() for model in (one, other))
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saving_into_the_folder_that_was_loaded_keeps_it(adapters: Adapters, tmp_path: Path) -> None:
    model = build(adapters, "basic")
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path)), logits_of(model))
