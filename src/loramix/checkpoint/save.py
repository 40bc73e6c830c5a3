"""Saving an expert or a mixture, all files or none; `loramix.checkpoint.mixture` has the layout.

Beside it, only where a trainer asks for it, lies `model.safetensors` with the trainer's tensors in the model's own
keys. The adapter files go before it when the folder is loaded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from loramix.adapter import Adapter
from loramix.checkpoint.atomic import Writer, save_files
from loramix.checkpoint.mixture import CLASSIFIER_PREFIX, check_classifier
from loramix.checkpoint.peft import WEIGHTS_NAMES, format_tensors
from loramix.checkpoint.tensors import is_ours, write_tensors
from loramix.config import CONFIG_NAME, PeftConfig, XLoraConfig
from loramix.errors import AdapterNameError, SaveError
from loramix.hub import is_local
from loramix.names import check_expert_names

TRAINER_NAME = "model.safetensors"
_WEIGHTS_NAME = WEIGHTS_NAMES[0]


def save_adapter(
    folder: str | os.PathLike[str], adapter: Adapter, trainer_state: Mapping[str, Tensor] | None = None
) -> None:
    """Save one expert in PEFT's format; all files or none (see `loramix.checkpoint.atomic`).

    Args:
        folder: made where it is missing.
        adapter: the expert.
        trainer_state: tensors by the model's own keys, for `model.safetensors`. Without it a `model.safetensors` that
            an earlier save of ours left there is deleted: it no longer belongs to these weights.

    Raises:
        SaveError: with the cause; nothing is lost.
    """
    folder = Path(folder)
    writers = _trainer_writer(trainer_state) | _adapter_writers(adapter)
    save_files(folder, writers, _stale(folder, writers))


def save_mixture(
    folder: str | os.PathLike[str],
    config: XLoraConfig,
    classifier: Mapping[str, Tensor],
    experts: Sequence[Adapter],
    trainer_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a mixture with its experts; all files or none (see `loramix.checkpoint.atomic`).

    In `adapters`, Hub identifiers are kept as a record, and local paths become the folders inside this one.

    Args:
        folder: made where it is missing.
        config: its `adapters` names the experts, in order.
        classifier: "layers.{i}.weight" and "layers.{i}.bias" -> tensor.
        experts: in the order of `config.adapters`.
        trainer_state: as for `save_adapter`.

    Raises:
        AdapterNameError: the experts are not those of the configuration.
        IncompleteCheckpointError, CorruptCheckpointError: the classifier is not that of the configuration.
        SaveError: with the cause; nothing is lost. Also where the folder of an expert's name holds an adapter that
            loramix did not write.
    """
    folder = Path(folder)
    names = [expert.name for expert in experts]
    if names != list(config.adapters):
        raise AdapterNameError(
            "A mixture is saved with the experts that its configuration names, in that order.",
            received=f"experts {names}, adapters {list(config.adapters)}",
            remedy="Leave the names in config.adapters as they were when the mixture was built.",
        )
    check_expert_names(names)
    check_classifier(config, classifier, "the mixture")
    saved = copy.copy(config)
    saved.adapters = {name: name if is_local(place) else place for name, place in config.adapters.items()}
    writers: dict[str, Writer] = {}
    for expert in experts:
        _check_not_foreign(folder / expert.name)
        writers |= {f"{expert.name}/{place}": write for place, write in _adapter_writers(expert).items()}
    writers |= _trainer_writer(trainer_state)
    writers[_WEIGHTS_NAME] = partial(
        write_tensors, tensors={CLASSIFIER_PREFIX + name: tensor for name, tensor in classifier.items()}
    )
    writers[CONFIG_NAME] = _config_writer(saved)
    save_files(folder, writers, _stale(folder, writers))


def _adapter_writers(adapter: Adapter) -> dict[str, Writer]:
    return {
        _WEIGHTS_NAME: partial(write_tensors, tensors=format_tensors(adapter)),
        CONFIG_NAME: _config_writer(adapter.config),
    }


def _config_writer(config: PeftConfig) -> Writer:
    return partial(_write_text, text=config.to_json())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _trainer_writer(trainer_state: Mapping[str, Tensor] | None) -> dict[str, Writer]:
    return {} if trainer_state is None else {TRAINER_NAME: partial(write_tensors, tensors=trainer_state)}


def _stale(folder: Path, writers: Mapping[str, Writer]) -> list[str]:
    return [TRAINER_NAME] if TRAINER_NAME not in writers and is_ours(folder / TRAINER_NAME) else []


def _check_not_foreign(folder: Path) -> None:
    """An expert's folder is not one that the user named: never overwrite an adapter there that is somebody else's."""
    present = [name for name in (CONFIG_NAME, *WEIGHTS_NAMES) if (folder / name).exists()]
    if folder.is_symlink() or (present and not is_ours(folder / _WEIGHTS_NAME)):
        raise SaveError(
            "A mixture is saved without overwriting adapters that loramix did not write.",
            received=f"{str(folder)!r}, {'a link' if folder.is_symlink() else 'with ' + ', '.join(present)}",
            remedy="Save the mixture to another folder, or move that adapter away.",
        )
