"""Where PEFT's X-LoRA cannot go, its plain LoRA is the oracle: a one-hot mixture equals the single expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from support.convolution import tiny_convolution
from support.mixtures import logits_of
from support.peft_side import PEFT_WARNINGS, lora, ours, write_expert
from support.tiny import ARCHITECTURES, TARGETS, gpt2, llama, opt, tokens

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

Base = Callable[[], PreTrainedModel]


def biased(model: PreTrainedModel) -> PreTrainedModel:
    """With biases that are not zero, as they are when a model is made."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


# each: the base model, the expert, and the setting without which it is another expert
EXPERTS: dict[str, tuple[Base, dict[str, Any], str]] = {
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}, "lora_magnitude_vector"),
    "dora with a base bias": (
        lambda: biased(opt()),
        {"target_modules": ["v_proj", "fc1"], "use_dora": True, "use_rslora": True},
        "lora_magnitude_vector",
    ),
    "dora on Conv1D": (
        lambda: biased(gpt2()),
        {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
        "lora_magnitude_vector",
    ),
    "bias": (llama, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}, "lora_B.bias"),
    "embedding of GPT-2": (gpt2, {"target_modules": ["wte"]}, "lora_embedding_A"),
    "convolution": (tiny_convolution, {"target_modules": ["conv"], "task_type": None}, "lora_A.weight"),
    "convolution with a bias": (
        tiny_convolution,
        {"target_modules": ["conv", "mix"], "lora_bias": True, "task_type": None},
        "lora_B.bias",
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_expert_of_an_architecture_equals_pefts_lora(
    architecture: str, folders: Callable[[str, str], tuple[str, ...]]
) -> None:
    experts, base = folders(architecture, "ranks"), ARCHITECTURES[architecture]
    model = ours(base(), experts)
    assert {path.rpartition(".")[2] for path in model.adapted_modules} == set(TARGETS[architecture])
    assert_each_expert_equals_pefts(model, experts, base)


@pytest.mark.parametrize("kind", EXPERTS)
def test_one_expert_of_each_kind_equals_pefts_lora(kind: str, tmp_path: Path) -> None:
    base, config, part = EXPERTS[kind]
    experts = [write_expert(tmp_path / str(i), base(), seed=i, r=2 + i, **config) for i in range(2)]
    model = ours(base(), experts)
    assert_each_expert_equals_pefts(model, experts, base)
    zeroed(model, part)
    assert_far(one_hot(model, 1), logits_of(lora(base(), experts[1])))


def test_a_convolution_is_gated_token_by_token(tmp_path: Path) -> None:
    """Against a loop over tokens and experts on the unfolded input."""
    config = {"target_modules": ["conv"], "task_type": None, "lora_alpha": 6}
    experts = [write_expert(tmp_path / str(i), tiny_convolution(), seed=i, r=2 + i, **config) for i in range(2)]
    model = ours(tiny_convolution(), experts, layerwise_scalings=True, softmax_temperature=0.01)
    model(input_ids=tokens())
    s = model.get_latest_scalings()[:, :, 0]
    layer = model.get_submodule(model.adapted_modules[0])
    seen: dict[str, torch.Tensor] = {}
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    model(input_ids=tokens())

    x, expected = seen["x"], layer.base_layer(seen["x"]).clone()
    weights = layer.stack.unstack(dict(layer.stack.named_parameters()))
    for e, w in weights.items():
        for t in range(s.shape[1]):
            low = torch.einsum("bhkw,rhkw->br", x[:, :, t : t + w.A.shape[2]], w.A)
            expected[:, :, t, 0] += s[:, t, e, None] * (6 / (2 + e)) * low @ w.B.flatten(1).T
    assert (s[:, 0] - s[:, 1]).abs().max() > 0.1
    assert_close(seen["y"], expected, atol=1e-5, rtol=1e-5)


def assert_each_expert_equals_pefts(model: Any, experts: Any, base: Base) -> None:
    with model.disable_adapter():
        plain = logits_of(model)
    for i, folder in enumerate(experts):
        expected = logits_of(lora(base(), folder))
        assert_close(one_hot(model, i), expected, atol=1e-5, rtol=1e-5)
        assert_far(plain, expected)


def one_hot(model: Any, expert: int) -> torch.Tensor:
    with model.fixed_scalings([float(i == expert) for i in range(len(model.expert_names))]):
        return logits_of(model)


def assert_far(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() > 1e-3


def zeroed(model: Any, part: str) -> None:
    """Take the part away that the expert is about."""
    for path in model.adapted_modules:
        layer = model.get_submodule(path)
        if part == "lora_magnitude_vector":
            layer.stack.lora_magnitude.data = layer.stack.dora_norm.clone()
        elif part == "lora_B.bias":
            layer.stack.lora_B.data[:, layer.stack.rank :] = 0
        else:
            layer.stack.lora_A.data[:] = 0
