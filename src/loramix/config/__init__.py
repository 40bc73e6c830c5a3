"""Configurations, as values: of one expert and of a mixture, with the checks that they must pass."""

from __future__ import annotations

# Imported at once, not at first use: importing a class registers it as the reader of its kind of file.
from loramix.config.base import PeftConfig, PeftType, TaskType
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig

__all__ = ["LoraConfig", "PeftConfig", "PeftType", "TaskType", "XLoraConfig"]
