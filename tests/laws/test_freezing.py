"""Frozen means frozen: what requires gradients after building, running, generating, saving, loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loramix
from loramix import PeftModel
from support.mixtures import mixture
from support.tiny import llama, tokens

Experts = Callable[[str], dict[str, str]]


@pytest.mark.parametrize("experts_train", [False, True])
def test_what_trains_stays_what_trains(experts_train: bool, experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"), use_trainable_adapters=experts_train)
    for happens in (
        lambda: None,
        lambda: model(tokens()),
        lambda: model.generate(tokens(), max_new_tokens=2),
        lambda: model.train().eval(),
        lambda: model.save_pretrained(tmp_path),
        lambda: _inside_contexts(model),
        lambda: model.to(torch.float32),
    ):
        happens()
        assert trainable(model) == expected(model, experts_train)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert trainable(loaded) == expected(loaded, experts_train)


@pytest.mark.parametrize("experts_train", [False, True])
def test_what_is_loaded_for_inference_does_not_train(experts_train: bool, experts: Experts, tmp_path: Path) -> None:
    mixture(experts("llama"), use_trainable_adapters=experts_train).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded(tokens())
    assert not trainable(loaded)
    assert not loaded.training


def test_a_plain_expert_trains_alone_and_when_loaded_only_if_asked(tmp_path: Path) -> None:
    model = loramix.get_peft_model(llama(), loramix.LoraConfig(target_modules=["q_proj"], use_dora=True))
    matrices = {f"{p}.stacks.0.{n}" for p in model.adapted_modules for n in ("lora_A", "lora_B", "lora_magnitude")}
    assert trainable(model) == matrices
    model.save_pretrained(tmp_path)
    assert not trainable(PeftModel.from_pretrained(llama(), tmp_path))
    assert trainable(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)) == matrices


def test_a_step_changes_the_router_and_nothing_else(experts: Experts) -> None:
    model = mixture(experts("llama")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("internal_xlora_classifier.")}


def test_the_count_of_trainable_parameters_is_the_routers(experts: Experts, capsys: pytest.CaptureFixture[str]) -> None:
    model = mixture(experts("llama"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_nb_trainable_parameters() == (64 * 3 + 3, total)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: 195 || all params: {total:,d} || trainable%: ")


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected(model: Any, experts_train: bool) -> set[str]:
    names = {name for name, _ in model.named_parameters() if name.startswith("internal_xlora_classifier.")}
    assert names
    return names | {f"{p}.stacks.0.{n}" for p in model.adapted_modules for n in ("lora_A", "lora_B") if experts_train}


def _inside_contexts(model: Any) -> None:
    with model.disable_adapter(), model.fixed_scalings([1.0, 0.0, 0.0]):
        model(tokens())
