"""Preparing a quantised base model for training, as PEFT's users know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loramix._compat import enable_checkpointing
from loramix.experts.base_layers import is_quantised, kind_of


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Freeze a quantised base model, hold what is not quantised in float32, and checkpoint its gradients.

    Quantised layers stay as they are. Those of other packages than bitsandbytes take the dtype that they were made
    for, so that beside them all of the model keeps its own, as in PEFT.

    Args:
        model: the base model, before `get_peft_model`.
        use_gradient_checkpointing: trade time for memory.
        gradient_checkpointing_kwargs: for transformers; `use_reentrant` is False unless given.
    """
    model.requires_grad_(False)
    quantised = [module for module in model.modules() if kind_of(module) is not None and is_quantised(module)]
    if all(type(module).__module__.startswith("bitsandbytes.") for module in quantised):
        packed = {id(parameter) for module in quantised for parameter in module.parameters()}
        for parameter in model.parameters():
            plain = type(parameter) is nn.Parameter and id(parameter) not in packed
            if plain and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        enable_checkpointing(model, **{"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
    return model
