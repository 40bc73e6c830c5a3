"""PEFT's side of the comparisons: experts as PEFT writes them, its X-LoRA, and its plain LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import loramix

PEFT_WARNINGS = (
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT asks transformers for it
    "ignore:Setting .save_embedding_layers. to .True.:UserWarning",
    "ignore:Model has .tie_word_embeddings=True.:UserWarning",
    "ignore:.lora_bias=True. was passed but:UserWarning",  # merging is of no interest here
    "ignore:Adapter .default.. . LoRA tensor.s. have invalid shape:UserWarning",  # biases are vectors
)
SHARPNESS = 40.0


def write_expert(folder: Path, base: PreTrainedModel, *, seed: int = 0, **config: Any) -> str:
    """An expert with random A and B, saved by PEFT; `base` is used up."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "magnitude" in name or ("lora_B" in name and name.endswith("bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def lora(base: PreTrainedModel, folder: str, **options: Any) -> peft.PeftModel:
    """PEFT's plain LoRA model of one saved expert."""
    return peft.PeftModel.from_pretrained(base, folder, **options)


def read_by_peft(base: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """PEFT's model of a file's configuration and tensors, key by key: its own reading renames keys of some models."""
    model = peft.get_peft_model(base, peft.LoraConfig.from_pretrained(folder)).eval()
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    assert not model.load_state_dict(named, strict=False).unexpected_keys
    return model


def xlora(base: PreTrainedModel, experts: Iterable[str], **config: Any) -> peft.PeftModel:
    """PEFT's X-LoRA of these folders, with a router whose scalings are far from uniform."""
    base.config.use_cache = False
    adapters = {str(i): folder for i, folder in enumerate(experts)}
    settings = {"hidden_size": base.config.hidden_size, "adapters": adapters, "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(5)
    model = peft.get_peft_model(base, peft.XLoraConfig(**settings))
    sharpen(model.base_model.internal_xlora_classifier)
    return model.eval()


def sharpen(classifier: nn.Module) -> None:
    """Scale the last layer's weights up until tokens differ in their scalings."""
    last = classifier.layers[-1]
    with torch.no_grad():
        last.weight.mul_(SHARPNESS / last.weight.shape[1] ** 0.5)


def ours(base: PreTrainedModel, experts: Iterable[str], like: peft.PeftModel | None = None, **config: Any) -> Any:
    """loramix's mixture of the same folders, with the router of PEFT's model."""
    adapters = {f"expert-{i}": folder for i, folder in enumerate(experts)}
    settings = {"hidden_size": base.config.hidden_size, "adapters": adapters, "task_type": "CAUSAL_LM", **config}
    model = loramix.get_peft_model(base, loramix.XLoraConfig(**settings))
    if like is not None:
        model.internal_xlora_classifier.load_state_dict(like.base_model.internal_xlora_classifier.state_dict())
    return model.eval()
