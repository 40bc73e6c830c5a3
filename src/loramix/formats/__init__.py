"""File formats: reading folders as experts and mixtures, editing what was read, and writing it.

To add one, see `loramix.formats.format`.
"""

from __future__ import annotations

from loramix._registry import import_modules
from loramix.formats.describe import Description, ExpertDescription, RouterDescription, describe
from loramix.formats.edit import add_expert, remove_expert, rename_expert, reorder_experts, replace_expert
from loramix.formats.format import ExpertFormat, Format, MixtureFormat, register_format
from loramix.formats.load import Kind, detect, load_adapter, load_mixture
from loramix.formats.lora import LoraFormat
from loramix.formats.mixture import MixtureCheckpoint
from loramix.formats.peft import check_replaceable
from loramix.formats.save import save_adapter, save_mixture
from loramix.formats.xlora import XLoraFormat

import_modules(__name__, __path__)

__all__ = [
    "Description",
    "ExpertDescription",
    "ExpertFormat",
    "Format",
    "Kind",
    "LoraFormat",
    "MixtureCheckpoint",
    "MixtureFormat",
    "RouterDescription",
    "XLoraFormat",
    "add_expert",
    "check_replaceable",
    "describe",
    "detect",
    "load_adapter",
    "load_mixture",
    "register_format",
    "remove_expert",
    "rename_expert",
    "reorder_experts",
    "replace_expert",
    "save_adapter",
    "save_mixture",
]
