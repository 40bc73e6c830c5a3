"""What loramix reads from a base model's configuration.

A model of several parts, such as a language model and a vision tower, has a configuration for each; the language
model's is read.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def text_config(config: PreTrainedConfig) -> Any:
    """The language model's configuration: the whole one, or a part of it."""
    return config.get_text_config()


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence, in tokens, that a model of this configuration reads; None if it has no limit."""
    return getattr(text_config(config), "max_position_embeddings", None)


def vocabulary_of(config: PreTrainedConfig) -> int:
    """The number of entries of the vocabulary."""
    return text_config(config).vocab_size


def blocks_of(config: PreTrainedConfig) -> int:
    """The number of blocks."""
    return text_config(config).num_hidden_layers


def identifier_of(model: PreTrainedModel) -> str | None:
    """The folder or Hub id that a model was loaded from; None if it was made in memory."""
    return model.config.name_or_path or None
