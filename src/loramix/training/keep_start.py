"""The start of a router as a candidate: a training that only makes it worse ends with what it began with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from loramix.files.json_file import read_json_object, write_json
from loramix.training.checkpoints import load_weights
from loramix.training.objectives import restore_temperature


class KeepStart(TrainerCallback):
    """Measures the start, which trainers leave out when they load the best model, and puts it back where it is better.

    Args:
        output: the output folder of the run; the start is a mixture in `start/`, its measure in `start/metric.json`.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / "start"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.eval_on_start = state.global_step == 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        name = _metric(args)
        if state.global_step == 0 and state.is_world_process_zero and metrics is not None and name in metrics:
            write_json(self.folder / "metric.json", {name: metrics[name]})

    def restore(self, model: PreTrainedModel, args: Any, state: Mapping[str, Any]) -> bool:
        """Load the start if no checkpoint was better; whether it was loaded.

        Args:
            model: the trained mixture.
            args: the trainer's arguments.
            state: the trainer's state.
        """
        file, best = self.folder / "metric.json", state["best_metric"]
        if not file.is_file() or best is None:
            return False
        start = float(read_json_object(file)[_metric(args)])
        if best > start if args.greater_is_better else best < start:
            return False
        load_weights(model, self.folder)
        restore_temperature(model, self.folder)
        return True


def _metric(args: Any) -> str:
    name = str(args.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"
