"""Experts on their way from files into the layers: read one after the other, and refused before the model changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loramix import CorruptCheckpointError, PeftModel, XLoraConfig, get_peft_model
from loramix.experts.adapter import LoraWeights
from loramix.files.tensors import write_tensors
from loramix.formats import peft
from support.tiny import llama

MAPS = Path("/proc/self/maps")
Adapters = Callable[[int], dict[str, str]]


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not list a process's memory maps")
def test_a_file_is_mapped_once_and_released_before_the_next_one_is_read(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: f"{folder}/adapter_model.safetensors" for name, folder in adapters(3).items()}
    move, read = LoraWeights.move_into, peft.read_tensors
    still_mapped: list[list[str]] = []
    opened: list[str] = []

    def watched(self: LoraWeights, place: LoraWeights) -> None:
        maps = MAPS.read_text()
        still_mapped.append([name for name, file in files.items() if file in maps])
        move(self, place)

    def counted(path: Path) -> dict[str, torch.Tensor]:
        opened.append(str(path))
        return read(path)

    monkeypatch.setattr(LoraWeights, "move_into", watched)
    monkeypatch.setattr(peft, "read_tensors", counted)
    model = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=adapters(3)))
    names, layers = list(files), sum("lora_A" in name for name, _ in model.named_parameters())
    assert still_mapped == [names[i:] for i in range(3) for _ in range(layers)]
    assert not any(file in MAPS.read_text() for file in files.values())
    assert opened == list(files.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["new mixture", "saved mixture", "expert"])
def test_an_expert_without_finite_numbers_is_named_and_the_model_left_alone(
    what: str, value: float, adapters: Adapters, tmp_path: Path
) -> None:
    saved = tmp_path / "mixture"
    get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=adapters(3))).save_pretrained(saved)
    experts = {name: str(saved / name) for name in adapters(3)}
    file = saved / "code" / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 1] = value
    write_tensors(file, tensors)
    calls: dict[str, Callable[[Any], Any]] = {
        "new mixture": lambda base: get_peft_model(base, XLoraConfig(hidden_size=64, adapters=experts)),
        "saved mixture": lambda base: PeftModel.from_pretrained(base, saved),
        "expert": lambda base: PeftModel.from_pretrained(base, experts["code"], "code"),
    }
    base = llama()
    kind, before = type(base), {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(CorruptCheckpointError, match="finite") as caught:
        calls[what](base)
    assert caught.value.received == "expert 'code': module 'model.layers.1.self_attn.v_proj' with infinite ones, or NaN"
    assert type(base) is kind
    assert {name: id(module) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())
