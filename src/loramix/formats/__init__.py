"""Files <-> adapters and classifiers: the only place that knows what is called how on disk."""

from __future__ import annotations

from loramix.formats.describe import (
    Description,
    ExpertDescription,
    Kind,
    RouterDescription,
    describe,
    detect,
)
from loramix.formats.lora import load_adapter
from loramix.formats.save import check_replaceable, save_adapter, save_mixture
from loramix.formats.xlora import MixtureCheckpoint, load_mixture

__all__ = [
    "Description",
    "ExpertDescription",
    "Kind",
    "MixtureCheckpoint",
    "RouterDescription",
    "check_replaceable",
    "describe",
    "detect",
    "load_adapter",
    "load_mixture",
    "save_adapter",
    "save_mixture",
]
