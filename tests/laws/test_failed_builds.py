"""A build that fails leaves the base model as it was, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import loramix
from loramix import errors
from support.disk import WEIGHTS, edited, truncated, without
from support.mixtures import logits_of, mixture
from support.routers import EnergyRouter
from support.tiny import gpt2, llama, qwen3, save_expert, tokens

Experts = Callable[[str], dict[str, str]]
Build = Callable[[PreTrainedModel, Experts, Path], object]


def build(base: PreTrainedModel, adapters: dict[str, str], **config: Any) -> object:
    return loramix.get_peft_model(base, loramix.XLoraConfig(**{"hidden_size": 64, "adapters": adapters, **config}))


def second(bad: Callable[[dict[str, str], Path], object], **config: Any) -> Build:
    """Build from a good expert and then a bad one."""
    return lambda base, experts, tmp: build(
        base, {"good": experts("llama")["math"], "bad": str(bad(experts("llama"), tmp / "bad"))}, **config
    )


def load(base: PreTrainedModel, experts: Experts, tmp: Path, **changes: Any) -> object:
    mixture(experts("llama")).save_pretrained(tmp / "saved")
    return loramix.PeftModel.from_pretrained(base, edited(tmp / "saved", tmp / "edited", **changes))


FAILURES: dict[str, tuple[type[errors.LoramixError], Build]] = {
    "no such folder": (errors.CheckpointNotFoundError, second(lambda _, bad: bad)),
    "truncated weights": (errors.CorruptCheckpointError, second(lambda e, bad: truncated(e["code"], bad))),
    "a missing matrix": (
        errors.IncompleteCheckpointError,
        second(lambda e, bad: without(e["code"], bad, "layers.1.mlp.up_proj.lora_A")),
    ),
    "a missing block": (
        errors.AdapterMismatchError,
        second(lambda e, bad: without(e["code"], bad, "layers.1.")),
    ),
    "modules_to_save": (
        errors.IncompleteCheckpointError,
        second(lambda e, bad: edited(e["code"], bad, modules_to_save=["lm_head"])),
    ),
    "another rank": (errors.CorruptCheckpointError, second(lambda e, bad: edited(e["code"], bad, r=5))),
    "a deeper base": (
        errors.AdapterMismatchError,
        second(lambda _, bad: save_expert(bad, llama(num_hidden_layers=3), target_modules=["q_proj"])),
    ),
    "a shallower base": (
        errors.AdapterMismatchError,
        second(lambda _, bad: save_expert(bad, llama(num_hidden_layers=1), target_modules=["q_proj"])),
    ),
    "a wider base": (
        errors.AdapterMismatchError,
        second(lambda _, bad: save_expert(bad, llama(intermediate_size=96), target_modules=["down_proj"])),
    ),
    "another architecture": (
        errors.AdapterMismatchError,
        second(lambda _, bad: save_expert(bad, gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)),
    ),
    "the head, with a router that reads activations": (
        errors.UnsupportedAdapterError,
        second(lambda e, bad: _of_the_head(e["code"], bad), router=EnergyRouter.kind),
    ),
    "another hidden size": (errors.ConfigurationError, second(lambda e, _: e["code"], hidden_size=65)),
    "top-k above E": (errors.ConfigurationError, second(lambda e, _: e["code"], top_k_lora=3)),
    "no experts": (errors.ConfigurationError, lambda base, *_: build(base, {})),
    "a new expert without modules": (
        errors.ConfigurationError,
        lambda base, *_: loramix.get_peft_model(base, loramix.LoraConfig(target_modules=["no_such"])),
    ),
    "a new expert with a head of its own": (
        errors.UnsupportedAdapterError,
        lambda base, *_: loramix.get_peft_model(
            base, loramix.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        ),
    ),
    "a new expert with an unknown start": (
        errors.ConfigurationError,
        lambda base, *_: loramix.get_peft_model(
            base, loramix.LoraConfig(target_modules=["q_proj"], init_lora_weights="orthogonal")
        ),
    ),
    "DoRA on an embedding": (
        errors.UnsupportedAdapterError,
        lambda base, *_: loramix.get_peft_model(
            base, loramix.LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=True)
        ),
    ),
    "a router of another depth": (errors.CheckpointError, lambda *args: load(*args, xlora_depth=2)),
    "a router of another width": (errors.LoramixError, lambda *args: load(*args, hidden_size=32)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_base_model_stays_as_it_was(failure: str, experts: Experts, tmp_path: Path) -> None:
    error, fails = FAILURES[failure]
    base = llama().train()
    base.model.embed_tokens.requires_grad_(False)
    before = everything(base)
    with pytest.raises(error):
        fails(base, experts, tmp_path)
    assert everything(base) == before
    assert all(map(torch.equal, base.state_dict().values(), llama().state_dict().values()))
    good = build(base, experts("llama"))
    assert isinstance(good, loramix.XLoraModel)


def test_a_part_of_a_mixture_is_no_base_model(experts: Experts) -> None:
    model = mixture(experts("llama"))
    before, logits = everything(model), logits_of(model)
    with pytest.raises(errors.ModelError, match="already carries"):
        loramix.get_peft_model(model.model, loramix.LoraConfig(target_modules=["q_proj"]))
    assert everything(model) == before
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_mixture_stays_as_it_was(failure: str, experts: Experts, tmp_path: Path) -> None:
    """What is built on a mixture replaces it, once it is built."""
    error, fails = FAILURES[failure]
    model = mixture(experts("llama"))
    model.model.norm.weight.requires_grad_(True)
    before, logits = everything(model), logits_of(model)
    with pytest.raises(error):
        fails(model, experts, tmp_path)
    assert everything(model) == before
    assert torch.equal(logits_of(model), logits)
    assert model.base_model.model is model
    assert torch.equal(model.unload()(tokens()).logits, llama()(tokens()).logits)


def test_the_error_names_expert_module_expected_and_found(experts: Experts, tmp_path: Path) -> None:
    wider = save_expert(tmp_path / "wide", llama(intermediate_size=96), target_modules=["down_proj"])
    with pytest.raises(errors.AdapterMismatchError) as caught:
        build(llama(), {"math": experts("llama")["math"], "wide": wider})
    for part in ("'wide'", "'model.layers.0.mlp.down_proj'", "(4, 128)", "(4, 96)"):
        assert part in caught.value.received


def test_an_expert_of_another_architecture_with_equal_names_and_shapes_is_accepted(tmp_path: Path) -> None:
    """Nothing in the files tells them apart, and PEFT's users rely on it for fine-tuned bases."""
    folder = save_expert(tmp_path, qwen3(), target_modules=["v_proj"])
    assert isinstance(build(llama(), {"v": folder}), loramix.XLoraModel)


def everything(model: Any) -> object:
    """Its class, its modules as objects, what trains, its modes, its tensors as objects, its attributes."""
    return (
        type(model),
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype, p._version) for name, p in model.named_parameters()],
        [(name, id(buffer)) for name, buffer in model.named_buffers()],
        [sorted(module.__dict__) for module in model.modules()],
        model.config.to_dict(),
    )


def _of_the_head(folder: str, copy: Path) -> Path:
    edited(folder, copy, target_modules=["lm_head"])
    tensors = {"lora_A": torch.zeros(3, 64), "lora_B": torch.zeros(96, 3)}
    weights = {f"base_model.model.lm_head.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(weights, copy / WEIGHTS)
    return copy
