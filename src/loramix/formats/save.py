"""Saving an expert or a mixture, all files or none; `loramix.formats.xlora` has the layout.

Beside it, only where a trainer asks for it, lies `model.safetensors` with the trainer's tensors in the model's own
keys. The adapter files go before it when the folder is loaded.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from loramix.config.base import PeftConfig, PeftType
from loramix.config.folder import CONFIG_NAME
from loramix.config.names import check_expert_names
from loramix.config.xlora import XLoraConfig
from loramix.errors import AdapterNameError, ConfigurationError, SaveError
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer, finish_interrupted, save_files, text_writer
from loramix.files.hub import is_local
from loramix.files.tensors import is_ours, write_tensors
from loramix.formats.lora import WEIGHTS_NAMES, format_tensors
from loramix.formats.xlora import CLASSIFIER_PREFIX, classifier_shapes

TRAINER_NAME = "model.safetensors"
_WEIGHTS_NAME = WEIGHTS_NAMES[0]


def save_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, trainer_state: Mapping[str, Tensor] | None = None
) -> None:
    """Save one expert in PEFT's format; all files or none (see `loramix.files.atomic`).

    Args:
        folder: made where it is missing.
        adapter: the expert.
        trainer_state: tensors by the model's own keys, for `model.safetensors`. Without it a `model.safetensors` that
            an earlier save of ours left there is deleted: it no longer belongs to these weights. One that is not
            ours stays, with a warning.

    Raises:
        SaveError: with the cause; nothing is lost. Also where an adapter lies in the way that is not an earlier save
            of the same kind.
    """
    adapter.config.validate()
    folder = as_folder(folder)
    finish_interrupted(folder)
    check_replaceable(folder, PeftType.LORA)
    writers = _trainer_writer(folder, trainer_state) | _adapter_writers(adapter)
    save_files(folder, writers, _stale(folder, writers))


def save_mixture(
    folder: str | os.PathLike[str],
    config: XLoraConfig,
    classifier: Mapping[str, Tensor],
    experts: Sequence[Adapter],
    trainer_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a mixture with its experts; all files or none (see `loramix.files.atomic`).

    In `adapters`, Hub identifiers are kept as a record, and local paths become the folders inside this one.

    Args:
        folder: made where it is missing.
        config: its `adapters` names the experts, in order.
        classifier: "layers.{i}.weight" and "layers.{i}.bias" -> tensor.
        experts: in the order of `config.adapters`.
        trainer_state: as for `save_adapter`.

    Raises:
        AdapterNameError: the experts are not those of the configuration.
        ConfigurationError: the configuration has become one that cannot be loaded, or not with this classifier.
        SaveError: with the cause; nothing is lost. Also where an adapter lies in the way that is not an earlier save
            of the same kind.
    """
    folder = as_folder(folder)
    names = [expert.name for expert in experts]
    if names != list(config.adapters):
        raise AdapterNameError(
            "A mixture is saved with the experts that its configuration names, in that order.",
            received=f"experts {names}, adapters {list(config.adapters)}",
            remedy="Leave the names in config.adapters as they were when the mixture was built.",
        )
    check_expert_names(names)
    _check_unchanged(config, classifier, experts)
    finish_interrupted(folder)
    check_replaceable(folder, PeftType.XLORA)
    _check_members(folder, names)
    saved = copy.copy(config)
    saved.adapters = {name: name if is_local(place) else place for name, place in config.adapters.items()}
    writers: dict[str, Writer] = {}
    for expert in experts:
        writers |= {f"{expert.name}/{place}": write for place, write in _adapter_writers(expert).items()}
    writers |= _trainer_writer(folder, trainer_state)
    writers[_WEIGHTS_NAME] = partial(
        write_tensors, tensors={CLASSIFIER_PREFIX + name: tensor for name, tensor in classifier.items()}
    )
    writers[CONFIG_NAME] = text_writer(saved.to_json())
    save_files(folder, writers, _stale(folder, writers))


def as_folder(place: str | os.PathLike[str]) -> Path:
    """Raises SaveError: no path, or an empty one, which would mean the working directory."""
    text = os.fspath(place) if isinstance(cast(object, place), str | os.PathLike) else ""
    if not text.strip() or "\0" in text:
        raise SaveError(
            "A save goes into a folder that is named.",
            received=repr(place),
            remedy='Give a folder, for example "mixture", or "." for the working directory.',
        )
    return Path(place)


def _check_unchanged(config: XLoraConfig, classifier: Mapping[str, Tensor], experts: Sequence[Adapter]) -> None:
    """A live configuration may have been changed by hand: what is saved is what can be loaded."""
    config.validate_for(len(experts), config.hidden_size)
    layers = len({path for expert in experts for path in expert.weights}) if config.layerwise_scalings else 1
    expected = classifier_shapes(config, layers * len(experts))
    found = {name: tuple(tensor.shape) for name, tensor in classifier.items()}
    if found != expected:
        raise ConfigurationError(
            "A router keeps the shape that it was built with.",
            received=f"a configuration that asks for {expected}, a router with {found}",
            remedy="Set hidden_size, layerwise_scalings, xlora_depth, xlora_size and xlora_dropout_p back to what "
            "they were; build a new mixture for others.",
        )


def _adapter_writers(adapter: Adapter) -> dict[str, Writer]:
    return {
        _WEIGHTS_NAME: partial(write_tensors, tensors=format_tensors(adapter)),
        CONFIG_NAME: text_writer(adapter.config.to_json()),
    }


def _trainer_writer(folder: Path, trainer_state: Mapping[str, Tensor] | None) -> dict[str, Writer]:
    if trainer_state is None:
        return {}
    if (folder / TRAINER_NAME).exists() and not is_ours(folder / TRAINER_NAME):
        warnings.warn(
            f"{str(folder / TRAINER_NAME)!r} is not loramix's and is left alone: a trainer cannot resume from here.",
            stacklevel=4,
        )
        return {}
    return {TRAINER_NAME: partial(write_tensors, tensors=trainer_state)}


def _stale(folder: Path, writers: Mapping[str, Writer]) -> list[str]:
    return [TRAINER_NAME] if TRAINER_NAME not in writers and is_ours(folder / TRAINER_NAME) else []


def check_replaceable(folder: Path, kind: PeftType = PeftType.XLORA) -> None:
    """Raises SaveError: an adapter lies in the way that loramix did not write, or that is of another kind."""
    present = [name for name in (CONFIG_NAME, *WEIGHTS_NAMES) if (folder / name).exists()]
    if present and not is_ours(folder / _WEIGHTS_NAME):
        raise _occupied(folder, f"{', '.join(present)} that loramix did not write")
    if CONFIG_NAME in present and PeftConfig.from_json_file(folder / CONFIG_NAME).peft_type != kind:
        raise _occupied(folder, "an adapter of another kind")


def _check_members(folder: Path, names: Sequence[str]) -> None:
    """The experts' subfolders are the mixture's own: experts that lay there before the mixture are not replaced."""
    is_mixture = (folder / CONFIG_NAME).exists()
    for name in names:
        if (folder / name).is_symlink():
            raise _occupied(folder / name, "a link")
        check_replaceable(folder / name, PeftType.LORA)
        if not is_mixture and (folder / name / CONFIG_NAME).exists():
            raise _occupied(folder / name, "an expert that is no part of a mixture")


def _occupied(folder: Path, content: str) -> SaveError:
    return SaveError(
        "A save replaces only what an earlier save of the same kind left there.",
        received=f"{str(folder)!r}, with {content}",
        remedy="Save to another folder, or move that adapter away.",
    )
