"""Evaluation: the loss on text of a mixture, its base model and its experts, and of the mixture without each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramix._lazy import loaded_at_first_use

if TYPE_CHECKING:
    from loramix.evaluation.ablation import LeaveOneOut, leave_one_out
    from loramix.evaluation.ceiling import Ceiling, causal_ceiling
    from loramix.evaluation.scores import Evaluation, evaluate

__all__ = ["Ceiling", "Evaluation", "LeaveOneOut", "causal_ceiling", "evaluate", "leave_one_out"]

_HOMES = {
    **dict.fromkeys(("Evaluation", "evaluate"), "scores"),
    **dict.fromkeys(("Ceiling", "causal_ceiling"), "ceiling"),
    **dict.fromkeys(("LeaveOneOut", "leave_one_out"), "ablation"),
}

__getattr__ = loaded_at_first_use(__name__, _HOMES)
