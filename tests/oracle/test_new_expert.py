"""A new expert: PEFT reads ours, we read PEFT's, and a training step from one file gives one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import PreTrainedModel

import loramix
from support.convolution import tiny_convolution
from support.mixtures import logits_of
from support.peft_side import PEFT_WARNINGS, lora, write_expert
from support.tiny import gemma3, gpt2, llama, save_expert, tokens

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

Base = Callable[[], PreTrainedModel]
KINDS: dict[str, tuple[Base, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "regular expression": (llama, {"target_modules": r".*layers\.1\.(self_attn\.o_proj|mlp\.up_proj)"}),
    "dora": (llama, {"target_modules": ["v_proj", "up_proj"], "use_dora": True}),
    "bias": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
    "embedding": (gemma3, {"target_modules": ["embed_tokens", "q_proj"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolution": (tiny_convolution, {"target_modules": ["conv"], "task_type": None}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_an_expert_of_ours(kind: str, tmp_path: Path) -> None:
    base, config = KINDS[kind]
    folder = save_expert(tmp_path, base(), **config)
    model = loramix.PeftModel.from_pretrained(base(), folder)
    theirs = lora(base(), folder)
    got = logits_of(model)
    assert_close(logits_of(theirs), got, atol=1e-5, rtol=1e-5)
    assert len(model.adapted_modules) == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())
    with model.disable_adapter():
        assert (logits_of(model) - got).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_equals_pefts(kind: str, tmp_path: Path) -> None:
    base, config = KINDS[kind]
    start = write_expert(tmp_path / "start", base(), **config)
    step(lora(base(), start, is_trainable=True), tmp_path / "peft")
    step(loramix.PeftModel.from_pretrained(base(), start, is_trainable=True), tmp_path / "ours")
    before, theirs, mine = (load(tmp_path / name) for name in ("start", "peft", "ours"))
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert_close(mine[name], expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert (expected - before[name]).abs().max() > 1e-4, name


def test_a_new_expert_starts_as_the_base_model_and_trains_like_pefts(tmp_path: Path) -> None:
    model = loramix.get_peft_model(llama(), loramix.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits_of(model), logits_of(llama()))
    model.save_pretrained(tmp_path / "start")
    step(model, tmp_path / "ours")
    step(lora(llama(), str(tmp_path / "start"), is_trainable=True), tmp_path / "peft")
    theirs, mine = load(tmp_path / "peft"), load(tmp_path / "ours")
    for name in (name for name in theirs if "lora_B" in name):
        assert_close(mine[name], theirs[name], atol=1e-5, rtol=1e-5)
        assert theirs[name].abs().max() > 1e-4


def test_dropout_is_drawn_as_peft_draws(tmp_path: Path) -> None:
    folder = write_expert(tmp_path, llama(), target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    model = loramix.PeftModel.from_pretrained(llama(), folder, is_trainable=True).train()
    drawn = []
    for each in (model, lora(llama(), folder, is_trainable=True).train()):
        torch.manual_seed(9)
        drawn.append(logits_of(each))
    assert_close(*drawn, atol=1e-5, rtol=1e-5)
    assert (logits_of(model.eval()) - drawn[0]).abs().max() > 1e-3


@pytest.mark.parametrize("choice", [True, "gaussian"])
def test_a_new_expert_is_drawn_as_peft_draws(choice: bool | str) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": choice, "r": 32}
    model = loramix.get_peft_model(llama(), loramix.LoraConfig(**config))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**config)).base_model.model
    layer, other = (m.get_submodule("model.layers.0.self_attn.q_proj") for m in (model, theirs))
    A, own = other.lora_A["default"].weight, layer.stack.lora_A
    assert_close(own.std(), A.std(), rtol=0.1, atol=0.0)
    assert_close(own.abs().max() > 3 * own.std(), A.abs().max() > 3 * A.std())  # normal, or uniform
    assert not layer.stack.lora_B.any()
    embedding = model.get_submodule("model.embed_tokens").stack
    assert not embedding.lora_A.any()
    assert_close(embedding.lora_B.std(), theirs.model.embed_tokens.lora_embedding_B["default"].std(), rtol=0.1, atol=0)


def step(model: Any, folder: Path) -> None:
    """One step of plain gradient descent, saved."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    logits = model(input_ids=tokens()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(seed=2).flatten()).backward()
    optimizer.step()
    model.save_pretrained(folder)


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "lora_" in name}


def test_freezing_a_trained_dora_expert_changes_no_output(tmp_path: Path) -> None:
    """The norms follow the matrices as long as these train; they must not fall back to where they started."""
    model = loramix.get_peft_model(llama(), loramix.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with torch.no_grad():
        for path in model.adapted_modules:
            model.get_submodule(path).stack.lora_B.normal_()
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    assert_close(logits_of(lora(llama(), str(tmp_path))), expected, atol=1e-5, rtol=1e-5)
    model.requires_grad_(False)
    assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_a_loaded_state_of_a_dora_expert_brings_its_norms(tmp_path: Path) -> None:
    folders = [write_expert(tmp_path / str(i), llama(), seed=i, **KINDS["dora"][1]) for i in range(2)]
    one, other = (loramix.PeftModel.from_pretrained(llama(), folder) for folder in folders)
    assert (logits_of(one) - logits_of(other)).abs().max() > 1e-3
    one.load_state_dict(other.state_dict())
    assert_close(logits_of(one), logits_of(other), atol=1e-6, rtol=1e-6)
