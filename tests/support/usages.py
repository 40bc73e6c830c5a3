"""Every usage of the configuration, as users write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loramix import XLoraConfig, get_peft_model
from support.mixtures import logits_of
from support.tiny import llama, tokens

Adapters = Callable[[int], dict[str, str]]
USAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "basic": (3, {"xlora_depth": 2, "xlora_dropout_p": 0.1}),
    "shallow": (3, {"xlora_depth": 1}),
    "deep": (4, {"xlora_depth": 4}),
    "sparse": (3, {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False}),
    "hard top-k": (3, {"top_k_lora": 2, "enable_softmax": False}),
    "dense top-k": (3, {"top_k_lora": 1}),
    "sharp": (3, {"softmax_temperature": 0.5}),
    "soft": (3, {"softmax_temperature": 2.0}),
    "layerwise": (3, {"layerwise_scalings": True}),
    "shared": (3, {"layerwise_scalings": False}),
    "trainable experts": (3, {"use_trainable_adapters": True}),
    "half weight": (3, {"global_scaling_weight": 0.5}),
    "scaling pass value": (3, {"scaling_pass_value": 0.333}),
    "everything": (5, {"xlora_depth": 3, "layerwise_scalings": True, "softmax_temperature": 0.8}),
}


def build(adapters: Adapters, usage: str = "shallow", **changes: Any) -> Any:
    """A mixture of one of the usages, in eval mode; with one seed, its router far from uniform."""
    count, settings = USAGES[usage]
    base = llama()
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        xlora_size=16,
        adapters=adapters(count),
        **{**settings, **changes},
    )
    torch.manual_seed(4)
    model: Any = get_peft_model(base, config)
    with torch.no_grad():
        model.internal_xlora_classifier.layers[-1].weight.mul_(8)
    return model.eval()


def generated(model: Any) -> Tensor:
    return model.generate(tokens(), max_new_tokens=5, do_sample=False)


def scalings(model: Any) -> Tensor:
    logits_of(model)
    return model.get_latest_scalings()
