"""Mixtures whose routing is far from uniform, and what the laws look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import loramix
from loramix.layers.routing import TensorRouting
from loramix.layers.slot import current
from support.tiny import ARCHITECTURES, tokens

SPARSE: dict[str, Any] = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}
HARD: dict[str, Any] = {"enable_softmax": False, "top_k_lora": 2}
SHARPNESS = 5.0


def mixture(experts: Mapping[str, str], architecture: str = "llama", base: Any = None, **config: Any) -> Any:
    """A mixture on a new base model, its router drawn with one seed, in eval mode."""
    base = base or ARCHITECTURES[architecture]()
    torch.manual_seed(3)
    has_classifier = config.get("router", "classifier") == "classifier"
    sizes = {"hidden_size": 64, **({"xlora_size": 32} if has_classifier else {})}
    model = loramix.get_peft_model(base, loramix.XLoraConfig(adapters=dict(experts), **{**sizes, **config}))
    if has_classifier:
        with torch.no_grad():
            model.internal_xlora_classifier.layers[-1].weight.mul_(SHARPNESS)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    return model(tokens() if ids is None else ids, **inputs).logits


def final_scalings(model: Any) -> Tensor:
    """(B, S, L or 1, E): what the layers of the mixture pass are given, seen from inside one of them."""
    seen: list[Any] = []
    handle = model.get_submodule(model.adapted_modules[0]).register_forward_hook(lambda *_: seen.append(current()))
    logits_of(model)
    handle.remove()
    assert isinstance(seen[-1], TensorRouting)
    return seen[-1].scalings


def far(one: Tensor, other: Tensor) -> bool:
    return bool((one.float() - other.float()).abs().max() > 1e-3)
