"""Constant scalings merged into weights: the plain model computes what the experts beside it computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from loramix import LoraConfig, PeftModel, UnsupportedOperationError, XLoraConfig, get_peft_model
from support.convolution import tiny_convolution
from support.mixtures import logits_of
from support.tiny import ARCHITECTURES, TARGETS, gemma3, gpt2, llama, save_expert

Experts = Callable[[str], dict[str, str]]
LORA: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{name: (ARCHITECTURES[name], {"target_modules": TARGETS[name]}) for name in ("llama", "gpt2", "opt")},
    "embedding, scaled and tied": (gemma3, {"target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA on Conv1D": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "a bias of B": (gpt2, {"target_modules": ["c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
}


def shaken(model: Any) -> Any:
    """The model with biases and magnitudes that a training has moved."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("case", LORA)
def test_a_lora_model_becomes_its_base_with_other_weights(case: str, tmp_path: Path) -> None:
    build, settings = LORA[case]
    base = build()
    kind, before = type(base), logits_of(base)
    model = shaken(get_peft_model(base, LoraConfig(r=3, init_lora_weights=False, **settings)))
    expected = logits_of(model)
    merged: Any = model.merge_and_unload()
    assert merged is base
    assert type(merged) is kind
    assert not isinstance(merged, PeftModel)
    assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.01
    merged.save_pretrained(tmp_path)
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scalings", [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_mixture_is_merged_with_its_fixed_scalings(
    architecture: str, scalings: list[float], experts: Experts
) -> None:
    config = XLoraConfig(hidden_size=64, adapters=experts(architecture), global_scaling_weight=0.5)
    model: Any = get_peft_model(ARCHITECTURES[architecture](), config)
    with model.fixed_scalings(scalings):
        expected = logits_of(model)
        merged = model.merge_and_unload()
    assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    assert type(merged) is type(ARCHITECTURES[architecture]())


def test_scalings_of_each_layer_are_merged(experts: Experts) -> None:
    model: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=experts("llama")))
    rows = torch.rand(len(model.adapted_modules), 3)
    with model.fixed_scalings(rows):
        expected = logits_of(model)
        assert_close(logits_of(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def test_two_dora_experts_share_a_layer(tmp_path: Path) -> None:
    folders = {
        name: save_expert(tmp_path / name, llama(), seed=i, target_modules=["q_proj"], use_dora=i < 2)
        for i, name in enumerate("abc")
    }
    model: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=folders))
    shaken(model)
    with model.fixed_scalings([0.3, 0.5, 0.7]):
        expected = logits_of(model)
        assert_close(logits_of(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def test_convolutions_are_merged() -> None:
    config = LoraConfig(r=2, target_modules=["conv", "mix"], init_lora_weights=False)
    model: Any = get_peft_model(tiny_convolution(), config).eval()
    expected = logits_of(model)
    assert_close(logits_of(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def test_a_head_tied_to_a_merged_embedding_keeps_its_weight() -> None:
    base: Any = gemma3()
    head = base.lm_head.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=3, init_lora_weights=False, target_modules=["embed_tokens"]))
    model.merge_and_unload()
    assert torch.equal(base.lm_head.weight, head)
    assert not torch.equal(base.model.embed_tokens.weight, head)
    assert base.config.tie_word_embeddings is False


class Quantised(nn.Module):
    """A linear layer whose weight is no plain tensor to add to."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed.T


def test_what_cannot_be_merged_is_refused_before_anything_changes() -> None:
    base: Any = llama()
    base.model.layers[1].self_attn.q_proj = Quantised(base.model.layers[1].self_attn.q_proj)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = logits_of(model)
    with pytest.raises(UnsupportedOperationError, match="Quantised"):
        model.merge_and_unload()
    assert isinstance(model, PeftModel)
    assert torch.equal(logits_of(model), expected)
    with pytest.raises(UnsupportedOperationError, match="other"):
        model.merge_and_unload(adapter_names=["other"])


def rounded(layer: nn.Linear) -> None:
    """As compressed-tensors does it: a plain layer with another forward on the object, which rounds the weight."""
    weight = (layer.weight.detach() * 8).round() / 8
    layer.forward = lambda x: nn.functional.linear(x, weight, layer.bias)  # type: ignore[method-assign]


class Subclass(torch.Tensor):
    """As torchao does it: a plain layer with a tensor of another class."""


def wrapped(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclass))


@pytest.mark.parametrize("quantise", [rounded, wrapped])
def test_a_layer_that_looks_plain_and_computes_with_another_weight_is_refused(
    quantise: Callable[[nn.Linear], None],
) -> None:
    base: Any = llama()
    quantise(base.model.layers[0].self_attn.q_proj)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with pytest.raises(UnsupportedOperationError, match=r"layers\.0\.self_attn\.q_proj.* a quantised one"):
        model.merge_and_unload()


def test_dora_takes_the_norm_of_the_weight_that_a_layer_computes_with(tmp_path: Path) -> None:
    plain: Any = llama()
    for layer in plain.model.layers:
        layer.self_attn.q_proj.weight.data = (layer.self_attn.q_proj.weight.data * 8).round() / 8
    folder = save_expert(tmp_path / "one", plain, target_modules=["q_proj"], use_dora=True)
    expected = logits_of(PeftModel.from_pretrained(plain, folder))
    base: Any = llama()
    for layer in base.model.layers:
        rounded(layer.self_attn.q_proj)
    assert_close(logits_of(PeftModel.from_pretrained(base, folder)), expected, atol=1e-5, rtol=1e-5)


def test_an_experts_bias_needs_one_in_the_base() -> None:
    model: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(UnsupportedOperationError, match="no place"):
        model.merge_and_unload()


def test_weights_that_overflow_are_not_merged() -> None:
    model: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.get_parameter("model.layers.0.self_attn.q_proj.stacks.0.lora_B").data.fill_(torch.inf)
    with pytest.raises(UnsupportedOperationError, match="infinite"):
        model.merge_and_unload()
