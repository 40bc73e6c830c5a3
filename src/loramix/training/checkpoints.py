"""The checkpoints of a run: which one to resume from, and whether the settings are still those of the run."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from transformers import PreTrainedModel

from loramix import formats
from loramix.errors import ConfigurationError, LoramixError
from loramix.files.json_file import read_json_object
from loramix.training.settings import TrainSettings

SETTINGS = "settings.json"


def compare_settings(output: Path, settings: TrainSettings) -> None:
    """Warn of settings that changed since a run was started; it continues with the new ones.

    Raises:
        ConfigurationError: another base model, other experts, or another mixture.
    """
    file = output / SETTINGS
    if not file.is_file():
        return
    before, now = (_flat(content) for content in (read_json_object(file), json.loads(json.dumps(asdict(settings)))))
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    shown = "; ".join(f"{key}: {before.get(key)!r}, now {now.get(key)!r}" for key in sorted(changed))
    if any(key.partition(".")[0] in ("base", "revision", "experts", "mixture") for key in changed):
        raise ConfigurationError(
            "A run goes on with the mixture that it was started with.",
            received=shown,
            remedy="Use another output folder, or begin anew with --fresh (resume=False).",
        )
    if changed:
        warnings.warn(f"This run goes on from its last checkpoint with other settings: {shown}.", stacklevel=3)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The last checkpoint that was written completely: its trainer state, which is written last, can be read.

    A training that is killed while it saves leaves an incomplete one, and continues from the one before.
    """
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_complete(path)
    ]
    return max(found)[1] if found else None


def _is_complete(path: Path) -> bool:
    try:
        load_state(path)
        formats.detect(path)
    except (OSError, ValueError, LoramixError):
        return False
    return True


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint."""
    return read_json_object(folder / "trainer_state.json")


def is_finished(folder: Path, arguments: Any) -> bool:
    """Whether a checkpoint is the last one of a run with these arguments."""
    state = load_state(folder)
    if arguments.max_steps > 0:
        return state["global_step"] >= arguments.max_steps
    return (state["epoch"] or 0) >= arguments.num_train_epochs - 1e-6


def load_trained(model: PreTrainedModel, folder: Path, *, best: bool) -> Path:
    """Load the weights of a finished run's last checkpoint, or of its best one; that checkpoint is returned."""
    state = load_state(folder)
    chosen = Path(state["best_model_checkpoint"]) if best and state["best_model_checkpoint"] else folder
    load_weights(model, chosen)
    return chosen


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load the trained tensors that a trainer saved."""
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=False)


def remove_checkpoints(output: Path) -> None:
    """Remove the checkpoints of an earlier run, so that a new one does not continue from them."""
    for path in output.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            shutil.rmtree(path)
