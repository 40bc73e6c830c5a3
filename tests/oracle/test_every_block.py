"""Every mixture-of-experts class of transformers: PEFT's expert of all parameters of its blocks, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from benchmarks.bases.configurations import classes, tiny_model
from torch.testing import assert_close

import loramix
from loramix.errors import UnsupportedAdapterError
from loramix.experts.blocks import form_of
from support.mixtures import logits_of
from support.peft_side import PEFT_WARNINGS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*PEFT_WARNINGS)]

REFUSED = {"InklingForCausalLM", "JetMoeForCausalLM", "LongcatFlashForCausalLM"}
"""Their blocks compute in ways of their own."""


def parameters_of_blocks(base: Any) -> dict[str, Any]:
    return {
        f"{path.rpartition('.')[2]}.{name}": module
        for path, module in base.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "Experts" in type(module).__name__
    }


@pytest.mark.parametrize("name", sorted(classes("causal").values()))
def test_an_expert_of_its_blocks(name: str, tmp_path: Path) -> None:
    try:
        base = tiny_model(name)
        found = parameters_of_blocks(base)
        plain = logits_of(base) if found else None
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {error}")
    if plain is None:
        pytest.skip("no mixture-of-experts block")
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
