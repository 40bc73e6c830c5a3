"""PEFT itself loads what `convert` writes for it, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix.model.convert import convert
from support.mixtures import far, logits_of
from support.original import forward_of_original, write_original
from support.peft_side import PEFT_WARNINGS, ours, sharpen
from support.tiny import llama, tokens

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

Folders = Callable[[str, str], tuple[str, ...]]

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "depth 1": {},
    "depth 3": {"xlora_depth": 3, "layerwise_scalings": True, "scaling_pass_value": 0.5},
    "without dropout": {"xlora_depth": 2, "xlora_dropout_p": 0.0, "global_scaling_weight": 0.5},
    "top-k": {"xlora_depth": 2, "top_k_lora": 1, "enable_softmax": False},
    "without biases": {"xlora_depth": 2, "use_bias": False, "layerwise_scalings": True},
    "without ReLU, which has no effect": {"enable_relu_and_dropout": False, "softmax_temperature": 0.5},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_mixture_of_the_original_library(name: str, folders: Folders, tmp_path: Path) -> None:
    experts = dict(zip(("math", "code", "prose"), folders("llama", "ranks"), strict=True))
    folder = write_original(tmp_path / "original", experts, 14, xlora_size=8, **CONFIGURATIONS[name])
    convert(folder, tmp_path / "peft", "peft")
    expected = forward_of_original(llama(), folder, tokens())
    assert_close(pefts_logits(tmp_path / "peft"), expected, atol=1e-5, rtol=1e-5)
    assert far(logits_of(llama()), expected)


@pytest.mark.parametrize("kind", ["ragged", "embedding"])
def test_a_mixture_of_loramix(kind: str, folders: Folders, tmp_path: Path) -> None:
    model = ours(llama(), folders("llama", kind), layerwise_scalings=True, xlora_depth=3, xlora_size=8)
    sharpen(model.internal_xlora_classifier)
    model.save_pretrained(tmp_path / "mixture")
    convert(tmp_path / "mixture", tmp_path / "peft", "peft")
    assert_close(pefts_logits(tmp_path / "peft"), logits_of(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def pefts_logits(folder: Path) -> Tensor:
    base = llama()
    base.config.use_cache = False
    return peft.PeftModel.from_pretrained(base, folder).eval()(input_ids=tokens()).logits
