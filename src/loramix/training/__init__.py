"""Training a router with stock trainers; and experts, when asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramix._lazy import loaded_at_first_use

if TYPE_CHECKING:
    from loramix.training.data import ExpertLabels, Row, read_rows
    from loramix.training.distil import Distillation, distil_router
    from loramix.training.initialise import init_router
    from loramix.training.objectives import FiniteGradients, RouterCallback, RouterObjectives
    from loramix.training.one_expert import ExpertFit, fit_expert
    from loramix.training.recall import ScalingPassCache, required_bytes

__all__ = [
    "Distillation",
    "ExpertFit",
    "ExpertLabels",
    "FiniteGradients",
    "RouterCallback",
    "RouterObjectives",
    "Row",
    "ScalingPassCache",
    "distil_router",
    "fit_expert",
    "init_router",
    "read_rows",
    "required_bytes",
]

_HOMES = {
    **dict.fromkeys(("ExpertLabels", "Row", "read_rows"), "data"),
    **dict.fromkeys(("Distillation", "distil_router"), "distil"),
    **dict.fromkeys(("ExpertFit", "fit_expert"), "one_expert"),
    "init_router": "initialise",
    **dict.fromkeys(("FiniteGradients", "RouterCallback", "RouterObjectives"), "objectives"),
    **dict.fromkeys(("ScalingPassCache", "required_bytes"), "recall"),
}

__getattr__ = loaded_at_first_use(__name__, _HOMES)
