"""What a run knows of its base model before the weights are loaded: configuration, tokenizer and dtype."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from loramix.errors import ConfigurationError, DataError
from loramix.experts.base_model import vocabulary_of
from loramix.files.base_models import load_config, load_tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_base(place: str, revision: str | None) -> tuple[PreTrainedConfig, PreTrainedTokenizerFast]:
    """The configuration and the tokenizer of a base model.

    Raises:
        DataError: a tokenizer with more tokens than the vocabulary.
        CheckpointError: as `load_config` and `load_tokenizer`.
    """
    tokenizer = load_tokenizer(place, revision)
    config = load_config(place, revision)
    size = vocabulary_of(config)
    if len(tokenizer) > size:
        raise DataError(
            "The tokenizer's tokens are those of the base model.",
            received=f"{len(tokenizer)} tokens, and a vocabulary of {size} in {place!r}",
            remedy="Use the tokenizer that the base model was trained with.",
        )
    return config, tokenizer


def dtype_of(name: str, config: PreTrainedConfig) -> torch.dtype:
    """The dtype of this name; "auto" is the one that the base model's configuration names, float32 if none.

    Raises:
        ConfigurationError: no such name.
    """
    if name == "auto":
        return getattr(config, "dtype", None) or torch.float32
    if name not in _DTYPES:
        raise ConfigurationError(
            f"dtype is auto, {', '.join(_DTYPES)}.", received=f"dtype={name!r}", remedy="Use dtype: auto."
        )
    return _DTYPES[name]
