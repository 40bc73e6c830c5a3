"""Drafts change no token: every strategy generates what the two passes one after the other do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM

from loramix.decoding.eligibility import MODELS
from support.generation import DRAFTED, generated, report_of
from support.mixtures import mixture
from support.tiny import gpt2, save_expert, save_experts, tokens
from support.versions import is_older

LONG = 12


@pytest.mark.parametrize("mode", DRAFTED)
def test_the_tokens_are_those_of_two_passes(mode: str, drafts: Any) -> None:
    if mode == "in chunks" and drafts.config.model_type == "gemma3_text" and is_older(5, 8):
        pytest.skip("transformers before 5.8: windows of attention are wrong where a prompt is read in chunks")
    inputs = DRAFTED[mode]() | {"max_new_tokens": LONG}
    expected = generated(drafts, lockstep=False, **inputs)
    assert report_of(drafts).tokens == 0
    found = generated(drafts, lockstep=True, **inputs)
    assert torch.equal(found, expected)
    report = report_of(drafts)
    new = expected.shape[1] - DRAFTED[mode]()["input_ids"].shape[1]
    assert report.reason is None
    assert report.tokens == new - 1  # the prompt gave the first
    wrong, rows = report.drafts - report.accepted_drafts, len(expected)
    assert report.tokens + 1 + wrong / rows <= report.forwards <= report.tokens + 1 + wrong
    assert report.drafts == rows * (report.tokens - 1) or (mode == "an end" and report.drafts > 0)
    for lockstep in (3, "lookup") if rows == 1 or mode == "batch" else (3,):  # only a row alone looks its text up
        assert torch.equal(generated(drafts, lockstep=lockstep, **inputs), expected)
        report = report_of(drafts)
        assert report.tokens == new - 1
        assert report.rounds["speculative" if lockstep == 3 else "lockstep"]


def test_an_end_of_text_within_the_prompt_finishes_no_row(of_llama: Any) -> None:
    """The last chunk of a prompt may be one token, and that token an end of text."""
    ids = tokens(2)
    ids[0, -1] = 1
    inputs = {"input_ids": ids, "prefill_chunk_size": 4, "eos_token_id": 1, "pad_token_id": 1, "max_new_tokens": LONG}
    expected = generated(of_llama, lockstep=False, **inputs)
    for lockstep in (True, 5, "lookup"):
        assert torch.equal(generated(of_llama, lockstep=lockstep, **inputs), expected)
        assert report_of(of_llama).tokens == expected.shape[1] - 9 - 1


def test_embeddings_are_continued_ahead(of_llama: Any) -> None:
    embeddings = of_llama.get_input_embeddings()(tokens(2))
    expected = generated(of_llama, inputs_embeds=embeddings, max_new_tokens=12, lockstep=False)
    assert torch.equal(generated(of_llama, inputs_embeds=embeddings, max_new_tokens=12, lockstep=5), expected)
    assert report_of(of_llama).rounds["speculative"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_stores_grow_and_windows_slide(architecture: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than a chunk has slots; with Gemma, a window of four."""
    monkeypatch.setattr("loramix.decoding.row_cache.CHUNK", 8)
    experts = save_experts(tmp_path, architecture)
    model = mixture(experts, architecture, layerwise_scalings=True, xlora_depth=2)
    model.set_global_scaling_weight(0.1)
    inputs = {"input_ids": tokens(2), "max_new_tokens": 28}
    expected = generated(model, lockstep=False, **inputs)
    for lockstep in (True, 5):
        assert torch.equal(generated(model, lockstep=lockstep, **inputs), expected)


def mistral(**changes: Any) -> Any:
    """A sliding window of four in every block, and no list that says so."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "sliding_window": 4}
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=96, num_key_value_heads=2, max_position_embeddings=128, **sizes, **special)
    config._attn_implementation = changes.get("attention", "sdpa")
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["greedy", "left padding"])
def test_a_window_in_every_block(mode: str, attention: str, experts: Any) -> None:
    model = mixture(experts("llama"), base=mistral(attention=attention), layerwise_scalings=True)
    inputs = DRAFTED[mode]() | {"max_new_tokens": LONG}
    expected = generated(model, lockstep=False, **inputs)
    for lockstep in (True, 3):
        assert torch.equal(generated(model, lockstep=lockstep, **inputs), expected)
        assert report_of(model).reason is None


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "granite": ("Granite", {"logits_scaling": 2.0}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, "sliding_window": 4}),
    "olmo2": ("Olmo2", {}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_model_classes_that_are_said_to_be_exact_are(kind: str, tmp_path: Any) -> None:
    name, special = KINDS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {} if kind == "gpt_neox" else {"num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(vocab_size=96, **sizes, **heads, **ends, **special)

    def build() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    assert config.model_type in MODELS
    targets = ["query_key_value"] if kind == "gpt_neox" else ["o_proj"] if kind == "phi3" else ["q_proj", "v_proj"]
    experts = {
        name: save_expert(tmp_path / name, build(), seed=i, target_modules=targets) for i, name in enumerate("ab")
    }
    model = mixture(experts, base=build())
    for mode in ("greedy", "left padding"):
        inputs = DRAFTED[mode]() | {"max_new_tokens": LONG}
        expected = generated(model, lockstep=False, **inputs)
        for lockstep in (True, 3):
            assert torch.equal(generated(model, lockstep=lockstep, **inputs), expected)
            assert report_of(model).reason is None


def test_every_class_that_is_said_to_be_exact_is_tested() -> None:
    assert {*KINDS, "llama", "qwen3", "gemma3_text", "opt", "gpt2", "mistral"} == MODELS


def test_the_last_position_is_reached(experts: Any) -> None:
    model = mixture(experts("gpt2"), base=gpt2(n_positions=32))
    inputs = {"input_ids": tokens(1, 9), "max_new_tokens": 32 - 9 + 1}
    expected = generated(model, lockstep=False, **inputs)
    for lockstep in (True, 5):
        assert torch.equal(generated(model, lockstep=lockstep, **inputs), expected)


def test_what_finished_rows_leave_behind_is_that_of_two_passes(of_llama: Any) -> None:
    ids = tokens(3)
    whole = generated(of_llama, input_ids=ids, max_new_tokens=12, lockstep=False)
    end = int(whole[0, 9 + 4])
    inputs = {"input_ids": ids, "max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 0}
    inputs |= {"return_dict_in_generate": True, "output_logits": True}
    expected = generated(of_llama, lockstep=False, **inputs)
    for lockstep in (True, 4):
        found = generated(of_llama, lockstep=lockstep, **inputs)
        assert torch.equal(found.sequences, expected.sequences)
        for one, other in zip(found.logits, expected.logits, strict=True):
            assert_close(one, other, atol=2e-5, rtol=1e-4)
        for one, other in zip(found.past_key_values.base.layers, expected.past_key_values.base.layers, strict=True):
            assert_close(one.keys, other.keys, atol=2e-5, rtol=1e-4)


def test_a_model_of_inference_tensors(experts: Any) -> None:
    with torch.inference_mode():
        model = mixture(experts("llama"))
        found = generated(model, input_ids=tokens(1), max_new_tokens=8, lockstep=True)
        assert torch.equal(found, generated(model, input_ids=tokens(1), max_new_tokens=8, lockstep=False))


@pytest.mark.parametrize("lockstep", [True, 2])
def test_the_distribution_is_that_of_two_passes(lockstep: Any, of_llama: Any) -> None:
    """400 samples of three tokens: the frequencies of the first two letters agree within what chance allows."""
    ids = tokens(1).repeat(400, 1)
    counts: list[Tensor] = []
    for setting, seed in ((False, 1), (lockstep, 2)):
        torch.manual_seed(seed)
        out = of_llama.generate(ids, max_new_tokens=3, do_sample=True, top_k=4, temperature=2.0, lockstep=setting)
        counts.append(torch.bincount(out[:, -1], minlength=96).double())
    one, other = counts
    seen = (one + other) > 0
    statistic = float(((one - other)[seen].square() / (one + other)[seen]).sum())
    freedom = int(seen.sum()) - 1
    assert freedom > 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of χ²
