"""Saving an expert or a mixture, all files or none.

If a trainer asks for it, `model.safetensors` is saved beside the adapter's files, with the tensors that train, by the
model's own keys. When the folder is loaded, the adapter's files take precedence.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor

from loramix.config.names import check_expert_names
from loramix.config.xlora import XLoraConfig
from loramix.errors import AdapterNameError, ConfigurationError, SaveError
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer, finish_interrupted, save_files
from loramix.files.tensors import is_ours, write_tensors
from loramix.formats.format import Content, Format, expert_format, mixture_format
from loramix.formats.mixture import MixtureCheckpoint

TRAINER_NAME = "model.safetensors"


def save_adapter(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    trainer_state: Mapping[str, Tensor] | None = None,
    *,
    format: str = "lora",
) -> None:
    """Save one expert, in PEFT's format unless another is named; all files or none (see `loramix.files.atomic`).

    Args:
        folder: created if missing.
        adapter: the expert.
        trainer_state: tensors by the model's own keys, for `model.safetensors`. If it is None, a `model.safetensors`
            of an earlier save is deleted, since it does not belong to these weights. A `model.safetensors` that
            loramix did not write stays, with a warning. Not used by formats that a trainer cannot resume from.
        format: the name of a registered format of experts.

    Raises:
        ConfigurationError: an unknown format, or a configuration with invalid values.
        UnsupportedOperationError: a read-only format.
        SaveError: with the cause; the folder keeps its earlier state. Also if the folder has an adapter that loramix
            did not write, or one of another kind.
    """
    adapter.config.validate()
    _save(folder, expert_format(format), adapter, trainer_state)


def save_mixture(
    folder: str | os.PathLike[str],
    config: XLoraConfig,
    router: Mapping[str, Tensor],
    experts: Sequence[Adapter],
    trainer_state: Mapping[str, Tensor] | None = None,
    *,
    base_weights: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] = (),
    format: str = "xlora",
) -> None:
    """Save a mixture with its experts, self-contained in PEFT's layout unless another format is named.

    All files are saved or none (see `loramix.files.atomic`).

    Args:
        folder: created if missing.
        config: its `adapters` names the experts, in order.
        router: the router's tensors by their names in its `state_dict`, such as "layers.0.weight".
        experts: in the order of `config.adapters`.
        trainer_state: as for `save_adapter`.
        base_weights: weights of the base model that are the mixture's own, by parameter name.
        layers: the paths of the adapted layers in the order of their numbers, for formats that hold them.
        format: the name of a registered format of mixtures.

    Raises:
        AdapterNameError: the experts are not those of the configuration.
        ConfigurationError: an unknown format, or a configuration with invalid values, or for another router.
        UnsupportedOperationError: a read-only format, or a mixture that the format cannot hold.
        SaveError: as for `save_adapter`.
    """
    checkpoint = MixtureCheckpoint(config, router, experts, base_weights or {}, layers)
    _check_unchanged(checkpoint)
    _save(folder, mixture_format(format), checkpoint, trainer_state)


def _save(
    folder: str | os.PathLike[str],
    format: Format[Content],
    content: Content,
    trainer_state: Mapping[str, Tensor] | None,
) -> None:
    place = _as_folder(folder)
    finish_interrupted(place)
    format.check_folder(place, content)
    writers = format.writers(content)
    if not format.resumable:
        save_files(place, writers)
        return
    writers = _trainer_writer(place, trainer_state) | writers
    save_files(place, writers, _stale(place, writers))


def _as_folder(place: str | os.PathLike[str]) -> Path:
    """The path of a folder; an empty one, which would mean the working directory, is refused by a SaveError."""
    text = os.fspath(place) if isinstance(cast(object, place), str | os.PathLike) else ""
    if not text.strip() or "\0" in text:
        raise SaveError(
            "The folder to save into must be named.",
            received=repr(place),
            remedy='Give a folder, for example "mixture", or "." for the working directory.',
        )
    return Path(place)


def _check_unchanged(checkpoint: MixtureCheckpoint) -> None:
    """Refuse to save what could not be loaded: the live configuration may have been changed by hand."""
    config, names = checkpoint.config, [expert.name for expert in checkpoint.experts]
    if names != list(config.adapters):
        raise AdapterNameError(
            "A mixture is saved with the experts that its configuration names, in that order.",
            received=f"experts {names}, adapters {list(config.adapters)}",
            remedy="Leave the names in config.adapters as they were when the mixture was built.",
        )
    check_expert_names(names)
    config.validate_for(len(names), config.hidden_size)
    expected = checkpoint.router_shapes()
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.router.items()}
    if expected is not None and found != expected:
        raise ConfigurationError(
            "A router keeps the shapes that it was built with.",
            received=f"a configuration that asks for {expected}, a router with {found}",
            remedy="Set hidden_size, layerwise_scalings, xlora_depth, xlora_size and xlora_dropout_p back to what "
            "they were; build a new mixture for others.",
        )


def _trainer_writer(folder: Path, trainer_state: Mapping[str, Tensor] | None) -> dict[str, Writer]:
    if trainer_state is None:
        return {}
    if (folder / TRAINER_NAME).exists() and not is_ours(folder / TRAINER_NAME):
        warnings.warn(
            f"{str(folder / TRAINER_NAME)!r} was not written by loramix and is left alone: a trainer cannot resume "
            "from this folder.",
            stacklevel=5,
        )
        return {}
    return {TRAINER_NAME: lambda path: write_tensors(path, trainer_state)}


def _stale(folder: Path, writers: Mapping[str, Writer]) -> list[str]:
    return [TRAINER_NAME] if TRAINER_NAME not in writers and is_ours(folder / TRAINER_NAME) else []
