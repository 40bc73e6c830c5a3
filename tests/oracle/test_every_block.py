"""Every mixture-of-experts class of transformers: PEFT's expert of all parameters of its blocks, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from benchmarks.bases.configurations import tiny_model
from torch.testing import assert_close

import loramix
from loramix.errors import UnsupportedAdapterError
from loramix.experts.blocks import form_of
from support.mixtures import logits_of
from support.peft_side import PEFT_WARNINGS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*PEFT_WARNINGS)]

OF = "5.23.0"
CLASSES = [
    "AfmoeForCausalLM",
    "AriaTextForCausalLM",
    "AXK1ForCausalLM",
    "AXK2ForCausalLM",
    "BailingHybridForCausalLM",
    "Cohere2MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "Dots1ForCausalLM",
    "Dots3NoteForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "HYV3ForCausalLM",
    "HYV4ForCausalLM",
    "Inkling2ForCausalLM",
    "InklingForCausalLM",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "KimiLinearForCausalLM",
    "Kolibri1ForCausalLM",
    "LagunaForCausalLM",
    "Llama4ForCausalLM",
    "LongcatFlashForCausalLM",
    "MellumForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiniMaxForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MiniMaxM3VLForCausalLM",
    "MixtralForCausalLM",
    "NemotronHForCausalLM",
    "OlmoeForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "SolarOpenForCausalLM",
    "ZayaForCausalLM",
]
"""The causal classes whose tiny model has such blocks."""
REFUSED = {"InklingForCausalLM", "JetMoeForCausalLM", "LongcatFlashForCausalLM"}
"""Their blocks compute in ways of their own."""


def parameters_of_blocks(base: Any) -> dict[str, Any]:
    return {
        f"{path.rpartition('.')[2]}.{name}": module
        for path, module in base.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "Experts" in type(module).__name__
    }


@pytest.mark.skipif(
    transformers.__version__ != OF, reason=f"the classes, and what their blocks compute, are those of transformers {OF}"
)
@pytest.mark.parametrize("name", CLASSES)
def test_an_expert_of_its_blocks(name: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    found = parameters_of_blocks(base)
    plain = logits_of(base)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=list(found))
    theirs = peft.get_peft_model(base, config).eval()
    torch.manual_seed(0)
    for path, parameter in theirs.named_parameters():
        if "lora_" in path:
            parameter.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    expected = logits_of(theirs)
    assert (expected - plain).abs().max() > 1e-2
    if name in REFUSED:
        assert not all(form_of(block) for block in found.values())
        with pytest.raises(UnsupportedAdapterError):
            loramix.PeftModel.from_pretrained(tiny_model(name), tmp_path)
        return
    model: Any = loramix.PeftModel.from_pretrained(tiny_model(name), tmp_path)
    assert_close(logits_of(model), expected, atol=2e-5, rtol=1e-3)
