"""What loramix reads from a base model and its configuration.

A model of several parts, such as a language model and a vision tower, has a configuration for each; the language
model's is read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from loramix.files.base_models import errors_only


class Backbones(NamedTuple):
    """The backbones that run the passes of a mixture.

    Attributes:
        main: the only one; or the decoder, which reads what the encoder returns.
        encoder: the encoder, where layers see its tokens; elsewhere None.
    """

    main: PreTrainedModel
    encoder: PreTrainedModel | None = None


def encoder_and_decoder(model: PreTrainedModel) -> Backbones | None:
    """The two backbones of an encoder–decoder; None of a model that has no two parts which can run passes."""
    if not model.config.is_encoder_decoder:
        return None
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if not isinstance(encoder, PreTrainedModel) or not isinstance(decoder, PreTrainedModel):
        return None
    if model in (encoder, decoder) or any(module is encoder for module in decoder.modules()):
        return None
    return Backbones(cast(PreTrainedModel, decoder.base_model), encoder)


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


def in_declared_order(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Paths of modules, in the order of `named_modules()` of a new model of the class; as they are where none is made.

    Some quantisers (GPTQ by optimum) replace modules in the order of their names.
    """
    kind: Any = type(model)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), errors_only():
            places = {path: place for place, (path, _) in enumerate(kind(copy.deepcopy(model.config)).named_modules())}
    except Exception:  # whatever the class comes up with
        return list(paths)
    return sorted(paths, key=lambda path: places.get(path, len(places)))


def identifier_of(model: PreTrainedModel) -> str | None:
    """The folder or Hub id that a model was loaded from; None if it was made in memory."""
    return model.config.name_or_path or None
