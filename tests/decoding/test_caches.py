"""A cache that the user passes in stays the user's: reused, copied, cropped; another model's is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from loramix import CacheError, LoraConfig, get_peft_model
from support.generation import ROUTING, generated, recomputed
from support.tiny import llama, tokens

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
KINDS: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_cache_is_filled_and_serves_several_turns(model: Any, kind: str) -> None:
    cache, text = KINDS[kind](model), tokens(1)
    for turn in range(3):
        expected = recomputed(model, input_ids=text, max_new_tokens=3)
        text = generated(model, input_ids=text, past_key_values=cache, max_new_tokens=3)
        assert torch.equal(text, expected)
        assert cache.get_seq_length() == text.shape[1] - 1
        text = torch.cat([text, tokens(1, 3, seed=10 + turn)], dim=1)


def test_a_given_cache_serves_beams(model: Any) -> None:
    found = generated(model, input_ids=tokens(), past_key_values=DynamicCache(config=model.config), num_beams=3)
    assert torch.equal(found, recomputed(model, input_ids=tokens(), num_beams=3))


def read(model: Any, ids: Tensor, cache: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).past_key_values


@pytest.mark.parametrize("kind", KINDS)
def test_a_system_prompt_is_read_once_and_copied(model: Any, kind: str) -> None:
    prompt = tokens(1, 6)
    cache = read(model, prompt, KINDS[kind](model))
    for seed in (1, 2):
        ids = torch.cat([prompt, tokens(1, 4, seed=seed)], dim=1)
        found = generated(model, input_ids=ids, past_key_values=copy.deepcopy(cache), max_new_tokens=4)
        assert torch.equal(found, recomputed(model, input_ids=ids, max_new_tokens=4))
    assert cache.get_seq_length() == cache.base.get_seq_length() == 6


def test_the_given_object_is_the_one_that_is_filled_and_returned(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    assert read(model, tokens(), cache) is cache
    assert isinstance(cache, DynamicCache)
    assert type(cache).__name__ == "DynamicCache"
    record = generated(
        model, input_ids=tokens(1), past_key_values=(mine := DynamicCache()), return_dict_in_generate=True
    )
    assert record.past_key_values is mine


def test_a_returned_cache_continues(model: Any) -> None:
    first = generated(model, input_ids=tokens(1), max_new_tokens=4, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, tokens(1, 2)], dim=1)
    found = generated(model, input_ids=ids, past_key_values=first.past_key_values)
    assert torch.equal(found, recomputed(model, input_ids=ids))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2"], indirect=True)
def test_a_cropped_cache_continues_from_there(model: Any) -> None:
    cache = read(model, tokens(1), DynamicCache())
    cache.crop(-4)
    assert cache.get_seq_length() == cache.base.get_seq_length() == 5
    ids = torch.cat([tokens(1)[:, :5], tokens(1, 3, seed=4)], dim=1)
    assert torch.equal(generated(model, input_ids=ids, past_key_values=cache), recomputed(model, input_ids=ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_cache_starts_anew(of_llama: Any, kind: str) -> None:
    cache = read(of_llama, tokens(), KINDS[kind](of_llama))
    cache.reset()
    found = generated(of_llama, input_ids=tokens(2, 7, seed=5), past_key_values=cache)
    assert torch.equal(found, recomputed(of_llama, input_ids=tokens(2, 7, seed=5)))


@pytest.mark.parametrize("change", ["batch_repeat_interleave", "batch_select_indices", "reorder_cache"])
def test_a_change_of_rows_reaches_both_passes(model: Any, change: str) -> None:
    rows = {
        "batch_repeat_interleave": torch.tensor([0, 0, 1, 1]),
        "batch_select_indices": torch.tensor([1]),
        "reorder_cache": torch.tensor([1, 0]),
    }[change]
    cache = read(model, tokens(), DynamicCache())
    getattr(cache, change)(2 if change == "batch_repeat_interleave" else rows)
    more = tokens(len(rows), 3, seed=6)
    with torch.no_grad():
        found = model(more, past_key_values=cache).logits
        whole = model(torch.cat([tokens()[rows], more], dim=1)).logits
    assert_close(found, whole[:, 9:], **TOLERANCE)


def other(experts: Any, **config: Any) -> Any:
    from support.mixtures import mixture

    return mixture(experts("llama"), **{**ROUTING, **config})


FOREIGN: dict[str, Callable[[Any, Any], Any]] = {
    "the base model": lambda _, __: read(llama(), tokens(), DynamicCache()),
    "the same model, disabled": lambda model, _: inside(model.disable_adapter(), model),
    "the same model, with fixed scalings": lambda model, _: inside(model.fixed_scalings([1.0, 0.0, 0.0]), model),
    "another mixture of the same experts": lambda _, experts: read(other(experts), tokens(), DynamicCache()),
    "another mixture": lambda _, experts: read(other(experts, xlora_depth=2), tokens(), DynamicCache()),
    "a plain LoRA model": lambda _, __: read(
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), tokens(), DynamicCache()
    ),
}


def inside(context: Any, model: Any) -> Any:
    with context:
        return read(model, tokens(), DynamicCache())


@pytest.mark.parametrize("who", FOREIGN)
def test_a_cache_that_another_model_filled_is_refused(of_llama: Any, experts: Any, who: str) -> None:
    cache = FOREIGN[who](of_llama, experts)
    before = cache.get_seq_length()
    more = torch.cat([tokens(), tokens(2, 1)], dim=1)
    for use in (
        lambda: of_llama(tokens(2, 1), past_key_values=cache),
        lambda: generated(of_llama, input_ids=more, past_key_values=cache),
    ):
        with pytest.raises(CacheError) as caught:
            use()
        assert "this mixture" in caught.value.remedy or "itself" in caught.value.rule
        assert "filled" in str(caught.value)
    assert cache.get_seq_length() == before == 9


@pytest.mark.parametrize("context", ["disabled", "fixed"])
def test_a_mixtures_cache_is_refused_where_one_pass_runs(of_llama: Any, context: str) -> None:
    cache = read(of_llama, tokens(), DynamicCache())
    manager = of_llama.disable_adapter() if context == "disabled" else of_llama.fixed_scalings([0.2, 0.3, 0.5])
    with manager, pytest.raises(CacheError, match="disabled or scalings fixed"):
        of_llama(tokens(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 9
    with torch.no_grad():
        assert torch.isfinite(of_llama(tokens(2, 1), past_key_values=cache).logits).all()


def test_the_base_model_can_still_run_beside_it(of_llama: Any) -> None:
    """Making a cache of two passes leaves the cache class as other models see it."""
    read(of_llama, tokens(), DynamicCache())
    mine = DynamicCache()
    assert type(mine) is DynamicCache
    assert not hasattr(read(llama(), tokens(), mine), "base")


@pytest.mark.parametrize(("part", "received"), [("mixture", "7 tokens of the mixture"), ("base", "7 of the scaling")])
def test_halves_that_have_come_apart_are_refused(of_llama: Any, part: str, received: str) -> None:
    cache = read(of_llama, tokens(), DynamicCache())
    for layer in getattr(cache, part).layers:
        layer.crop(-2)
    with pytest.raises(CacheError, match=received):
        of_llama(tokens(2, 1), past_key_values=cache)
