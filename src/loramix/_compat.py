"""What differs between the versions of transformers that loramix runs on; nothing else in loramix asks for a version.

Each difference says which version brought it, and tests/project/test_compat.py holds both sides. The versions
themselves are checked in `loramix._versions`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from loramix._versions import release_of

_VERSION = release_of(transformers.__version__)


class UnboundedCacheLayer(CacheLayerMixin):
    """A layer of a key-value cache that grows as it is filled.

    transformers 5.13 renamed `get_max_cache_shape`, which is abstract, to `get_max_length`.
    """

    is_compileable = False

    @abstractmethod
    def mask_sizes(self) -> tuple[int, int]:
        """How many slots the next forward sees, and the first of them."""

    def get_mask_sizes(self, query_length: object) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`mask_sizes`; given the number of the queries, and before transformers 5.4 their slots."""
        return self.mask_sizes()

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    get_max_cache_shape = get_max_length


def generation_cache(model: Any, generation_config: Any, cache: Cache | None) -> Cache | None:
    """The cache that a generation fills; transformers 5.0, and no other, leaves the default one to the forward.

    Args:
        model: what generates.
        generation_config: complete.
        cache: the one that `generate` has prepared, if any.
    """
    left_out = _VERSION < (5, 1) and cache is None and generation_config.use_cache is not False
    left_out = left_out and not model.config.is_encoder_decoder
    if left_out and model._supports_default_dynamic_cache():
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    return cache


def finish_reset(cache: Cache) -> None:
    """Drop what growing layers still hold after `cache.reset()`: before transformers 5.18 zeros, as many as before."""
    parts = (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else ()
    for part in parts:
        finish_reset(part)
    for layer in getattr(cache, "layers", ()):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


class BlockSettings(NamedTuple):
    """What a mixture-of-experts block says to transformers' experts interface.

    transformers 5.0 has two settings; `has_gate` and `has_post_expert_norm` are missing, as in any later block where
    they have their defaults.
    """

    is_transposed: bool
    has_bias: bool
    has_gate: bool = True
    has_post_expert_norm: bool = False


def block_settings(module: nn.Module) -> BlockSettings | None:
    """The settings of a block that runs in the experts interface; None for any other module."""
    own = {name: value for name, value in vars(module).items() if name in BlockSettings._fields}
    return BlockSettings(**own) if {"is_transposed", "has_bias"} <= own.keys() else None


CACHE = "past_key_values" if _VERSION < (5, 24) else "cache"
"""What the key-value cache is called among a model's arguments and in its output; renamed in transformers 5.24."""

CACHES = tuple(dict.fromkeys(("past_key_values", "cache_params", CACHE)))
"""The names of the cache in arguments and outputs, in this version of transformers; before 5.24, `cache` is what
continuous batching passes to the attention."""

_OLD, _NEW = "gradient_checkpointing", "activation_checkpointing"
CHECKPOINTING = _NEW if hasattr(PreTrainedModel, f"{_NEW}_enable") else _OLD
"""What gradient checkpointing is called, in models and in training arguments: transformers 5.23 renamed it."""


def enable_checkpointing(model: PreTrainedModel, **options: Any) -> None:
    """Switch gradient checkpointing on.

    Args:
        model: any model of transformers.
        **options: for `torch.utils.checkpoint`; `use_reentrant` for instance.
    """
    getattr(model, f"{CHECKPOINTING}_enable")(options)


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on in any part of the model."""
    return bool(getattr(model, f"is_{CHECKPOINTING}"))


def checkpointing_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments in which gradient checkpointing has its present name, whichever it was given by."""
    names = {f"{known}{end}": f"{CHECKPOINTING}{end}" for known in (_OLD, _NEW) for end in ("", "_kwargs")}
    return {names.get(name, name): value for name, value in arguments.items()}
