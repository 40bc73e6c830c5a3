"""Loading a base model, its configuration and its tokenizer, from a folder or the Hub, with our errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

import huggingface_hub.utils.logging
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from loramix.errors import CheckpointNotFoundError, CorruptCheckpointError, ModelError

_Loaded = TypeVar("_Loaded")


def load_base(identifier: str, revision: str | None = None, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal language model.

    Args:
        identifier: folder or Hub id.
        revision: branch, tag or commit of a Hub repository; None is the default branch.
        dtype: "auto" is the dtype that it was saved in.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no causal language model in it.
        CorruptCheckpointError: files that cannot be read, or that do not belong together.
    """
    call = cast(Any, AutoModelForCausalLM).from_pretrained
    return _load(identifier, lambda: call(identifier, revision=revision or "main", dtype=dtype))


def load_config(identifier: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a base model, without its weights; arguments and errors as for `load_base`."""
    call = cast(Any, AutoConfig).from_pretrained
    return _load(identifier, lambda: call(identifier, revision=revision or "main"))


def without_weights(config: PreTrainedConfig, *, causal: bool = False) -> PreTrainedModel:
    """The base model of a configuration on the meta device: its modules and their shapes, without weights.

    Args:
        config: the base model's.
        causal: a causal language model; otherwise a model of the class that the configuration names.

    Raises:
        ModelError: no such model can be made of the configuration.
    """
    named: list[Any] = [getattr(transformers, name, None) for name in config.architectures or ()]
    auto: list[Any] = [AutoModelForCausalLM.from_config, AutoModel.from_config]
    failures: list[Exception] = []
    for make in auto[:1] if causal else (*filter(None, named), *auto):
        try:
            with torch.device("meta"):
                return make(config).eval()
        except Exception as error:  # a configuration of another kind, or one that its class cannot take
            failures.append(error)
    raise ModelError(
        f"A {'causal language' if causal else 'base'} model can be made of its configuration.",
        received=f"{config.name_or_path!r}, of type {config.model_type!r}: {one_line(failures[0])[:200]}",
        remedy="name a model for text generation" if causal else "name a model of transformers",
    ) from failures[0]


def load_tokenizer(identifier: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a base model, from its folder; arguments and errors as for `load_base`."""
    call = cast(Any, AutoTokenizer).from_pretrained
    return _load(identifier, lambda: call(identifier, revision=revision or "main"))


def _load(identifier: str, call: Callable[[], _Loaded]) -> _Loaded:
    try:
        with errors_only():
            return call()
    except OSError as error:
        raise CheckpointNotFoundError(
            "The base model and its tokenizer can be loaded from a folder or from the Hub.",
            received=f"{identifier!r}: {one_line(error)}",
            remedy="name another folder or Hub id as the base model (--base FOLDER_OR_HUB_ID)",
        ) from error
    # For a damaged file, transformers, tokenizers and safetensors raise exceptions of nearly any class.
    except Exception as error:
        raise CorruptCheckpointError(
            "The files of the base model and its tokenizer can be read, and fit each other.",
            received=f"{identifier!r}: {one_line(error)}",
            remedy="download the base model again, or name another one (--base FOLDER_OR_HUB_ID)",
        ) from error


def one_line(error: Exception) -> str:
    """Another library's exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def errors_only() -> Generator[None]:
    """Silence the warnings that transformers and huggingface_hub log."""
    hub = huggingface_hub.utils.logging
    before = logging.get_verbosity(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before[0])
        hub.set_verbosity(before[1])
