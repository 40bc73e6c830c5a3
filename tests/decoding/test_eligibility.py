"""Where drafts might change a token, none are used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from loramix.decoding.choice import Automatic
from loramix.decoding.eligibility import why_not_this_generation
from loramix.passes.state import state_of
from support.generation import generated, report_of
from support.mixtures import mixture
from support.tiny import tokens

LONG = 24


def test_one_pass_needs_no_lockstep(of_llama: Any) -> None:
    with of_llama.disable_adapter():
        generated(of_llama, input_ids=tokens(), max_new_tokens=4)
    assert report_of(of_llama).reason == "there is only one pass"


def test_a_model_in_training_mode_draws_for_each_pass(experts: Any) -> None:
    model = mixture(experts("llama")).train()
    generated(model, input_ids=tokens(1), max_new_tokens=2)
    assert "training mode" in str(report_of(model).reason)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frequencies": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
    "another kind": ({"model_type": "gpt_neo"}, "gpt_neo"),
    "router logits": ({"output_router_logits": True}, "router logits"),
    "other attention": ({"layer_types": ["chunked_attention", "full_attention"]}, "other than full"),
    "flash attention": ({"_attn_implementation": "flash_attention_2"}, "takes no masks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_is_not_done(case: str, of_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, reason = REFUSED[case]
    config = copy.deepcopy(of_llama.config)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    settings = GenerationConfig(use_cache=True)
    settings.is_assistant = False
    monkeypatch.setattr(of_llama, "config", config)
    found = why_not_this_generation(of_llama, state_of(of_llama), Automatic(), settings, DynamicCache())
    assert reason in str(found)


def test_a_hook_that_somebody_put_on_a_module_sees_one_row_a_text(of_llama: Any) -> None:
    rows: list[int] = []
    handle = of_llama.model.layers[0].register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    generated(of_llama, input_ids=tokens(2), max_new_tokens=8)
    handle.remove()
    assert set(rows) == {2}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_cache_of_ones_own(architecture: str, experts: Any) -> None:
    """One that was made without the model's configuration knows no windows: then the passes go one by one."""
    model = mixture(experts(architecture), architecture)
    ids = tokens(2)
    expected = generated(model, input_ids=ids, past_key_values=DynamicCache(), max_new_tokens=LONG, lockstep=False)
    found = generated(model, input_ids=ids, past_key_values=DynamicCache(), max_new_tokens=LONG)
    assert torch.equal(found, expected)
    cache = DynamicCache(config=model.config)
    assert torch.equal(
        generated(model, input_ids=ids, past_key_values=cache, max_new_tokens=LONG, lockstep=True), expected
    )
    assert report_of(model).drafts
