"""The trainer's arguments: a run's settings as TRL's `SFTConfig`, with the defaults of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from loramix._compat import CHECKPOINTING, checkpointing_arguments
from loramix.errors import ConfigurationError
from loramix.evaluation.passages import window_size
from loramix.experts.base_model import positions_of
from loramix.files.base_models import one_line
from loramix.training.settings import check_keys

_TENTH = 0.1
"""Of the steps, as trainers count evaluations."""


def trainer_arguments(output: str, trainer: Mapping[str, Any], base_config: Any, *, keeps_best: bool = False) -> Any:
    """TRL's `SFTConfig` of a run.

    Args:
        output: the folder for checkpoints.
        trainer: the run's own arguments, which go before the defaults.
        base_config: the base model's configuration, whose positions bound `max_length`.
        keeps_best: whether there is text to evaluate with. Ten times, or where checkpoints are saved, the model is
            evaluated then, and the best one is loaded at the end, unless the arguments say otherwise.

    Raises:
        ConfigurationError: arguments that do not exist or cannot work.
    """
    from trl.trainer.sft_config import SFTConfig

    positions = positions_of(base_config)
    longest = window_size(base_config)
    known = {entry.name for entry in fields(SFTConfig)}
    trainer = checkpointing_arguments(trainer)
    check_keys(trainer, sorted(known), "trainer")
    defaults = {
        CHECKPOINTING: False,
        "bf16": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "max_length": longest,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    if keeps_best and not trainer.keys() & {"eval_strategy", "save_strategy", "load_best_model_at_end"}:
        every = trainer.get("eval_steps", trainer.get("save_steps", _TENTH))
        defaults |= {"eval_strategy": "steps", "load_best_model_at_end": True, "eval_steps": every, "save_steps": every}
    given: dict[str, Any] = {name: value for name, value in defaults.items() if name in known} | trainer
    _refuse_wrong_types(given, SFTConfig)
    if (given.get(f"{CHECKPOINTING}_kwargs") or {}).get("use_reentrant"):
        raise ConfigurationError(
            "A mixture needs non-reentrant gradient checkpointing.",
            received=f"trainer.{CHECKPOINTING}_kwargs with use_reentrant: true",
            remedy="Leave it out.",
        )
    length = given["max_length"]
    if isinstance(length, int) and not 2 <= length <= (positions or length):
        raise ConfigurationError(
            "max_length is at least 2 and at most the positions that the base model has.",
            received=f"trainer.max_length={length}; the base model has {positions or 'no limit'}",
            remedy=f"Use trainer.max_length={longest}.",
        )
    try:
        return SFTConfig(output_dir=output, **given)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(
            "trainer holds arguments that TRL's SFTConfig takes.",
            received=f"{trainer!r}: {one_line(error)}",
            remedy="Correct them; https://huggingface.co/docs/trl/sft_trainer lists them.",
        ) from error


def _refuse_wrong_types(given: Mapping[str, Any], kind: Any) -> None:
    """Raises ConfigurationError: no number where TRL's own default is one."""
    defaults = {entry.name: entry.default for entry in fields(kind)}
    for name, value in given.items():
        default = defaults[name]
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigurationError(
                f"trainer.{name} is a number.", received=f"{value!r}", remedy=f"Use for example {name}={default!r}."
            )
