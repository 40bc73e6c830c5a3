"""Training a mixture's router, and its experts when asked: with stock trainers, from outside the core."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramix.training.data import ExpertLabels, Row, read_rows
    from loramix.training.evaluation import Evaluation, evaluate
    from loramix.training.initialise import init_router
    from loramix.training.objectives import FiniteGradients, RouterCallback, RouterObjectives
    from loramix.training.recall import ScalingPassCache, required_bytes

__all__ = [
    "Evaluation",
    "ExpertLabels",
    "FiniteGradients",
    "RouterCallback",
    "RouterObjectives",
    "Row",
    "ScalingPassCache",
    "evaluate",
    "init_router",
    "read_rows",
    "required_bytes",
]

_HOMES = {
    **dict.fromkeys(("ExpertLabels", "Row", "read_rows"), "data"),
    **dict.fromkeys(("Evaluation", "evaluate"), "evaluation"),
    "init_router": "initialise",
    **dict.fromkeys(("FiniteGradients", "RouterCallback", "RouterObjectives"), "objectives"),
    **dict.fromkeys(("ScalingPassCache", "required_bytes"), "recall"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
