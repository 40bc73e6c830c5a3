"""Layers that see the tokens in the cache, as in multi-head latent attention: the cache keeps their scalings."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import loramix
import support.routers  # noqa: F401 - registers a layer router
from loramix import CacheError
from loramix._compat import CACHE, enable_checkpointing
from loramix.experts.dry_run import dry_run
from loramix.layers.functional import lora_mixture_reference
from loramix.layers.slot import current
from support.generation import PADDING, ROUTING, generated, ids_with_padding, recomputed, report_of
from support.mixtures import logits_of, mixture
from support.tiny import GATED, HIDDEN, build, llama, save_expert, tokens
from support.versions import needs_transformers

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16}
LATENT |= {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
SPARSE: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SPARSE |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


class Latent(hf.models.llama.modeling_llama.LlamaAttention):
    """Caches what it is given, and projects keys and values of the whole text anew."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **inputs: Any) -> Any:
        seen, cache = hidden_states, inputs.get(CACHE)
        if cache is not None:
            seen = cache.update(seen[:, None], seen[:, None], self.layer_idx)[0][:, 0]
        shape = (len(seen), -1, self.config.num_attention_heads, self.head_dim)
        q, k, v = (
            layer(x).view(shape).transpose(1, 2)
            for layer, x in ((self.q_proj, hidden_states), (self.k_proj, seen), (self.v_proj, seen))
        )
        causal = attention_mask is None and len(q[0, 0]) > 1
        y = F.scaled_dot_product_attention(q, k, v, attention_mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


def latent() -> Any:
    base: Any = llama(num_key_value_heads=4)
    for block in base.model.layers:
        block.self_attn.__class__ = Latent
    return base


def latent_mistral() -> Any:
    base: Any = build(hf.MistralForCausalLM, **{**GATED, "num_key_value_heads": 4, "sliding_window": 4})
    for block in base.model.layers:
        block.self_attn.__class__ = Latent
    return base


CHUNKS = needs_transformers(5, 8, "a text is not read in chunks without a cache of the user")
STATIC = needs_transformers(5, 8, "a static cache does not say how many tokens of latent attention it holds")
LOOKUP = needs_transformers(5, 18, "prompt lookup needs an end token")
NEW = needs_transformers(5, 23, "the cache of this model holds keys and values, or the model is not there")
BASES: dict[str, tuple[Callable[[], Any], str]] = {
    "latent": (latent, "v_proj"),
    "windows": (latent_mistral, "v_proj"),
}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "deepseek_v2": (lambda: build(hf.DeepseekV2ForCausalLM, **{**GATED, **LATENT, **SPARSE}), "kv_b_proj"),
    "deepseek_v3": (lambda: build(hf.DeepseekV3ForCausalLM, **{**GATED, **LATENT, **SPARSE}), "kv_b_proj"),
    "minicpm3": (lambda: build(hf.MiniCPM3ForCausalLM, **{**GATED, **LATENT}), "kv_b_proj"),
    "glm4_moe_lite": (lambda: build(hf.Glm4MoeLiteForCausalLM, **{**GATED, **LATENT, **SPARSE}), "kv_b_proj"),
    "youtu": (lambda: build(hf.YoutuForCausalLM, **{**GATED, **LATENT}), "kv_b_proj"),
}
BASES |= MODELS


@pytest.fixture(params=["latent", "windows", *(pytest.param(name, marks=NEW) for name in MODELS)])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def experts_of(name: str, folder: Path, **config: Any) -> dict[str, str]:
    make, layer = BASES[name]
    return {
        expert: save_expert(folder / expert, make(), seed=seed, target_modules=[layer, "o_proj"], **config)
        for seed, expert in enumerate(("math", "code", "prose"))
    }


@pytest.fixture
def model(name: str, tmp_path: Path) -> Any:
    return mixture(experts_of(name, tmp_path), base=BASES[name][0](), **ROUTING)


@pytest.fixture
def of_latent(tmp_path: Path) -> Any:
    return mixture(experts_of("latent", tmp_path), base=latent(), **ROUTING)


def cache_of(model: Any) -> Any:
    return DynamicCache(config=model.config)


def test_they_are_told_from_others(name: str) -> None:
    uses = dry_run(BASES[name][0]().base_model)
    assert uses
    assert {use.sees for path, use in uses.items() if path.endswith(BASES[name][1])} == {"cached tokens"}
    assert {use.sees for path, use in uses.items() if path.endswith(("o_proj", "q_proj", "q_b_proj"))} == {"tokens"}


def test_each_token_has_its_own_scalings(model: Any, name: str) -> None:
    path = next(path for path in model.adapted_modules if path.endswith(BASES[name][1]))
    layer, seen = model.get_submodule(path), []
    handle = layer.register_forward_hook(lambda _, given, y: seen.append((given[0], y, current())))
    logits_of(model)
    handle.remove()
    x, y, routing = seen[-1]
    x, y = x.reshape(2, 9, -1), y.reshape(2, 9, -1)
    scalings = routing.every.scalings[:, :, layer.stack.number]
    parts = layer.stack.unstack(dict(layer.stack.named_parameters()))
    experts = [(part.A, part.B, 2.0) for part in parts.values()]
    assert_close(y, layer.base_layer(x) + lora_mixture_reference(x, experts, scalings), **TOLERANCE)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": tokens(2)},
        {"input_ids": tokens(1, 1)},
        {"input_ids": tokens(2), "num_beams": 3},
        {"input_ids": ids_with_padding(), "attention_mask": PADDING},
        {"input_ids": tokens(2), "do_sample": True, "num_return_sequences": 2},
        pytest.param({"input_ids": tokens(2), "prefill_chunk_size": 4}, marks=CHUNKS),
        pytest.param({"input_ids": tokens(2), "cache_implementation": "static"}, marks=STATIC),
        pytest.param(
            {"input_ids": ids_with_padding(), "attention_mask": PADDING, "cache_implementation": "static"}, marks=STATIC
        ),
        pytest.param({"input_ids": torch.cat([tokens(1, 4)] * 3, 1), "prompt_lookup_num_tokens": 3}, marks=LOOKUP),
    ],
    ids=["greedy", "one token", "beams", "left padding", "sampling", "in chunks", "static", "static, padded", "lookup"],
)
def test_generation(model: Any, inputs: dict[str, Any]) -> None:
    assert torch.equal(generated(model, **inputs), recomputed(model, **inputs))


@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=STATIC)])
def test_in_parts(model: Any, kind: str) -> None:
    cache = cache_of(model) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    ids = tokens(2, 12)
    whole = logits_of(model, ids)
    for start, end in ((0, 5), (5, 9), (9, 10), (10, 12)):
        found = logits_of(model, ids[:, start:end], past_key_values=cache)
        assert_close(found, whole[:, start:end], **TOLERANCE)


def test_a_cropped_a_copied_and_a_pickled_cache_go_on(model: Any, name: str) -> None:
    ids, cache = tokens(2, 12), cache_of(model)
    whole = logits_of(model, ids)
    logits_of(model, ids[:, :9], past_key_values=cache)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert_close(logits_of(model, ids[:, 9:], past_key_values=other), whole[:, 9:], **TOLERANCE)
    if name == "windows":  # what has left the window does not come back
        return
    logits_of(model, tokens(2, 2, seed=9), past_key_values=cache)
    cache.crop(-4)
    assert_close(logits_of(model, ids[:, 7:], past_key_values=cache), whole[:, 7:], **TOLERANCE)


@pytest.mark.parametrize("change", ["batch_repeat_interleave", "batch_select_indices", "reorder_cache"])
def test_a_change_of_rows_reaches_the_scalings(model: Any, change: str) -> None:
    rows = torch.tensor({"batch_repeat_interleave": [0, 0, 1, 1], "batch_select_indices": [1]}.get(change, [1, 0]))
    cache = cache_of(model)
    logits_of(model, past_key_values=cache)
    getattr(cache, change)(2 if change == "batch_repeat_interleave" else rows)
    more = tokens(len(rows), 3, seed=6)
    whole = logits_of(model, torch.cat([tokens()[rows], more], 1))
    assert_close(logits_of(model, more, past_key_values=cache), whole[:, 9:], **TOLERANCE)


def test_an_emptied_cache_starts_anew(of_latent: Any) -> None:
    cache = cache_of(of_latent)
    logits_of(of_latent, past_key_values=cache)
    cache.reset()
    other = tokens(3, 5, seed=4)
    assert_close(logits_of(of_latent, other, past_key_values=cache), logits_of(of_latent, other), **TOLERANCE)
    cache.crop(-5)
    assert_close(logits_of(of_latent, tokens(3), past_key_values=cache), logits_of(of_latent, tokens(3)), **TOLERANCE)


def test_a_returned_cache_continues(of_latent: Any) -> None:
    first = generated(of_latent, input_ids=tokens(1), max_new_tokens=4, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, tokens(1, 2)], 1)
    found = generated(of_latent, input_ids=ids, past_key_values=first.past_key_values)
    assert torch.equal(found, recomputed(of_latent, input_ids=ids))


def test_scalings_that_have_come_apart_from_the_cache_are_refused(of_latent: Any) -> None:
    cache = cache_of(of_latent)
    logits_of(of_latent, past_key_values=cache)
    cache.scalings = cache.scalings[:, 1:]
    with pytest.raises(CacheError, match="hold the same tokens"):
        of_latent(tokens(2, 1), past_key_values=cache)


def test_as_many_texts_as_tokens_are_mixed_as_each_alone(model: Any) -> None:
    rows = torch.cat([logits_of(model, row[None]) for row in tokens(4, 4)])
    assert_close(logits_of(model, tokens(4, 4)), rows, **TOLERANCE)


def test_no_drafts(of_latent: Any) -> None:
    generated(of_latent, input_ids=tokens())
    assert report_of(of_latent).reason == "a layer sees the tokens in the cache"


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_kinds_of_experts(tmp_path: Path, config: dict[str, Any], layerwise: bool) -> None:
    model = mixture(experts_of("latent", tmp_path, **config), base=latent(), layerwise_scalings=layerwise)
    assert torch.equal(generated(model, input_ids=tokens()), recomputed(model, input_ids=tokens()))


@pytest.mark.parametrize("router", ["static", "test-energy"])
def test_in_one_pass_with_a_cache(name: str, tmp_path: Path, router: str) -> None:
    config = loramix.XLoraConfig(adapters=experts_of(name, tmp_path), router=router, hidden_size=HIDDEN)
    model: Any = loramix.get_peft_model(BASES[name][0](), config).eval()
    ids = tokens(2, 12)
    whole = logits_of(model, ids)
    scalings = model.get_latest_scalings()
    cache = cache_of(model)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        found = logits_of(model, ids[:, start:end], past_key_values=cache)
        assert_close(found, whole[:, start:end], **TOLERANCE)
        assert_close(model.get_latest_scalings(), scalings[:, start:end], **TOLERANCE)


def test_where_scalings_are_fixed_the_cache_is_the_base_models(model: Any) -> None:
    with model.fixed_scalings([0.2, 0.3, 0.5]):
        assert torch.equal(generated(model, input_ids=tokens()), recomputed(model, input_ids=tokens()))


def test_training_in_one_step_and_with_checkpointing(of_latent: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(of_latent, use_reentrant=False)
        of_latent.zero_grad()
        of_latent.train()(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad.clone() for p in of_latent.internal_xlora_classifier.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)
        assert one.abs().sum() > 0
