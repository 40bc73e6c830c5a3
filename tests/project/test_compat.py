"""What differs between versions of transformers, tested on the side of each difference that is installed.

`make test-lowest` runs the same tests on the other side.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from loramix import _compat
from loramix._compat import (
    CACHE,
    CHECKPOINTING,
    BlockSettings,
    UnboundedCacheLayer,
    block_settings,
    checkpointing_arguments,
    enable_checkpointing,
    finish_reset,
    generation_cache,
    is_checkpointing,
)
from loramix._versions import release_of
from loramix.passes.call import ForwardSignature
from support.tiny import gpt_oss, llama, qwen3_moe, tokens

VERSION = release_of(transformers.__version__)
SOURCES = Path(_compat.__file__).parent


def test_a_block_says_how_it_computes_by_the_names_of_this_version() -> None:
    assert block_settings(qwen3_moe().get_submodule("model.layers.0.mlp.experts")) == BlockSettings(False, False)
    assert block_settings(gpt_oss().get_submodule("model.layers.0.mlp.experts")) == BlockSettings(True, True)
    assert block_settings(llama().get_submodule("model.layers.0.mlp")) is None


class Layer(UnboundedCacheLayer):
    """The least that a layer of a cache is."""

    def lazy_initialization(self, *_: object) -> None: ...

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        return keys, values

    def get_seq_length(self) -> int:
        return 3

    def mask_sizes(self) -> tuple[int, int]:
        return 7, 2


def test_a_cache_layer_answers_by_the_names_of_this_version() -> None:
    cache = Cache(layers=[Layer()])
    name = "get_max_length" if VERSION >= (5, 13) else "get_max_cache_shape"
    assert getattr(cache.layers[0], name)() == -1
    asked = 4 if VERSION >= (5, 4) else torch.arange(4)
    assert cache.get_mask_sizes(asked, 0) == (7, 2)


def test_a_generation_has_a_cache_that_can_be_seen() -> None:
    """Transformers 5.0 alone leaves the default one to the forward, which makes the same."""
    given, used = DynamicCache(), SimpleNamespace(use_cache=True)
    assert generation_cache(llama(), used, given) is given
    assert generation_cache(llama(), SimpleNamespace(use_cache=False), None) is None
    made = generation_cache(llama(), used, None)
    if VERSION >= (5, 1):
        assert made is None
    else:
        assert {type(layer) for layer in made.layers} == {DynamicLayer}


def test_a_cache_that_is_reset_holds_nothing() -> None:
    cache = DynamicCache(config=llama().config)
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    cache.reset()
    finish_reset(cache)
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
    assert keys.shape[-2] == 1


def test_the_cache_has_the_name_of_this_version() -> None:
    """The model's own forward and its output have it, and a backbone takes the old one too."""
    model = llama()
    assert CACHE in inspect.signature(model.forward).parameters
    out = model(tokens(), use_cache=True)
    assert out[CACHE].get_seq_length() == 9
    signature = ForwardSignature.of(type(model.model).forward)
    assert signature.cache == CACHE
    assert signature.by_name((), {"past_key_values": out[CACHE]}) == {CACHE: out[CACHE]}


def test_checkpointing_has_the_name_of_this_version() -> None:
    expected = "activation_checkpointing" if VERSION >= (5, 23) else "gradient_checkpointing"
    assert expected == CHECKPOINTING
    model = llama()
    enable_checkpointing(model, use_reentrant=False)
    assert is_checkpointing(model)
    assert model.model._gradient_checkpointing_func.keywords == {"use_reentrant": False}


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_either_name_is_taken_in_training_arguments(name: str) -> None:
    given = {name: True, f"{name}_kwargs": {"use_reentrant": False}, "seed": 1}
    expected = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}, "seed": 1}
    assert checkpointing_arguments(given) == expected


def test_no_other_file_asks_for_a_version() -> None:
    asks = re.compile(r"\b(torch|transformers|huggingface_hub|safetensors|trl|accelerate)\.__version__")
    found = {path.name for path in SOURCES.rglob("*.py") if asks.search(path.read_text(encoding="utf-8"))}
    assert found == {"_compat.py"}
