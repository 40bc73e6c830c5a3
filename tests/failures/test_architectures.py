"""Other architectures: they work, or one clear error names what is not supported. The base model stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from loramix import PeftModel, XLoraConfig, errors, get_peft_model
from support.peft_side import PEFT_WARNINGS, write_expert
from support.refusals import refused
from support.tiny import BLOCKS, GATED, SPECIAL, build, tokens
from support.versions import needs_transformers

UNTIED: dict[str, Any] = {**BLOCKS, "tie_word_embeddings": False}
WIDE: dict[str, Any] = {**UNTIED, "intermediate_size": 128}
ENCODER: dict[str, Any] = {**BLOCKS, "intermediate_size": 128}
ENCODER_DECODER: dict[str, Any] = {"vocab_size": 96, "d_model": 64, "pad_token_id": 0, "decoder_start_token_id": 0}
BART: dict[str, Any] = {
    **{f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 2), ("ffn_dim", 128))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "forced_eos_token_id": None,
    **ENCODER_DECODER,
}
T5: dict[str, Any] = {"d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
GPTJ: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "neox": (hf.GPTNeoXForCausalLM, WIDE),
    "bloom": (hf.BloomForCausalLM, {**UNTIED, "n_layer": 2, "n_head": 4}),
    "falcon": (hf.FalconForCausalLM, {**UNTIED, "ffn_hidden_size": 128}),
    "gptj": (hf.GPTJForCausalLM, {**SPECIAL, **GPTJ, "tie_word_embeddings": False}),
    "mistral": (hf.MistralForCausalLM, {**WIDE, "num_key_value_heads": 2}),
    "phi3": (hf.Phi3ForCausalLM, {**WIDE, "num_key_value_heads": 2}),
    "mixtral": (hf.MixtralForCausalLM, {**WIDE, "num_key_value_heads": 2, "num_local_experts": 4}),
    "mamba": (hf.MambaForCausalLM, {**UNTIED, "state_size": 8}),
    "bert, classification": (hf.BertForSequenceClassification, ENCODER),
    "bert, tokens": (hf.BertForTokenClassification, ENCODER),
    "bert, masked": (hf.BertForMaskedLM, ENCODER),
    "llama, classification": (hf.LlamaForSequenceClassification, GATED),
    "t5": (
        hf.T5ForConditionalGeneration,
        {**ENCODER_DECODER, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    ),
    "bart": (hf.BartForConditionalGeneration, BART),
}
WORK: dict[str, list[str]] = {
    "neox": ["query_key_value", "dense_h_to_4h"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["query_key_value"],
    "gptj": ["q_proj", "fc_in"],
    "mistral": ["q_proj", "up_proj"],
    "phi3": ["qkv_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "mamba": ["in_proj", "x_proj"],
    "bert, classification": ["query", "value"],
    "bert, tokens": ["query", "intermediate.dense"],
    "bert, masked": ["query", "value", "output.dense"],
    "llama, classification": ["q_proj", "down_proj"],
    "t5": ["q", "v", "wi"],
    "bart": ["q_proj", "v_proj", "fc1"],
}
REFUSED: dict[str, tuple[str, list[str], type[errors.LoramixError], str]] = {
    "a head that classifies": ("llama, classification", ["q_proj", "score"], errors.UnsupportedAdapterError, "'score'"),
    "a pooler": (
        "bert, classification",
        ["query", "pooler.dense"],
        errors.UnsupportedAdapterError,
        "pooler.dense' sees",
    ),
    "BERT's head": ("bert, classification", ["query", "classifier"], errors.UnsupportedAdapterError, "'classifier'"),
}

pytestmark = pytest.mark.filterwarnings(
    *PEFT_WARNINGS,
    "ignore:.*tie_word_embeddings.*:UserWarning",
    # Mamba before transformers 5.5: its state is an argument of its own, so it generates without.
    "ignore:use_cache has no effect.*:UserWarning",
)


def make(name: str) -> Any:
    kind, config = MODELS[name]
    return build(kind, **config)


def folders(root: Path, name: str, targets: list[str] | str) -> dict[str, str]:
    settings = {"target_modules": targets, "task_type": None}
    return {expert: write_expert(root / expert, make(name), seed=i, **settings) for i, expert in enumerate("ab")}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    inputs: dict[str, Any] = {"use_cache": False} if model.can_generate() else {}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(length=5, seed=2)
    return model(tokens(), **inputs).logits


@pytest.mark.parametrize("name", WORK)
def test_it_runs_generates_saves_and_loads(name: str, tmp_path: Path) -> None:
    experts = folders(tmp_path, name, WORK[name])
    model: Any = get_peft_model(make(name), XLoraConfig(hidden_size=64, adapters=experts)).eval()
    with torch.no_grad():
        model.internal_xlora_classifier.layers[-1].weight.mul_(20)
    found, base = logits(model), logits(make(name))
    assert (found - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert_close(logits(model), base)
    for i, folder in enumerate(experts.values()):
        alone: Any = PeftModel.from_pretrained(make(name), folder)
        with model.fixed_scalings([1.0 - i, float(i)]):
            assert_close(logits(model), logits(alone), atol=1e-5, rtol=1e-4)
    if model.can_generate():
        settings = {"max_new_tokens": 6, "do_sample": False}
        cached = model.generate(tokens(), **settings)
        assert torch.equal(cached, model.generate(tokens(), use_cache=False, **settings))
        if not model.config.is_encoder_decoder:  # with tied heads these repeat a token, whatever the experts
            assert not torch.equal(cached, make(name).generate(tokens(), **settings))
    model.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(PeftModel.from_pretrained(make(name), tmp_path / "mixture")), found)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named_and_the_base_stays(case: str, tmp_path: Path) -> None:
    name, targets, error, named = REFUSED[case]
    experts = folders(tmp_path, name, targets[0] if "*" in targets[0] else targets)
    base = make(name)
    config = XLoraConfig(hidden_size=64, adapters=experts)
    assert named in refused(error, base, tmp_path, lambda: get_peft_model(base, config)).received


@needs_transformers(5, 5, "the cache of Mamba is none of the class Cache")
def test_a_mamba_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    config = XLoraConfig(hidden_size=64, adapters=folders(tmp_path, "mamba", ["in_proj"]))
    model: Any = get_peft_model(make("mamba"), config).eval()
    cache = make("mamba")(tokens(), use_cache=True).cache_params
    with pytest.raises(errors.CacheError):
        model(tokens(2, 1), cache_params=cache)
