"""Configurations of an expert and of a mixture: values, and the checks on them."""

from __future__ import annotations

# Not imported lazily: importing a class registers it as the reader of its peft_type.
from loramix.config.base import PeftConfig, PeftType, TaskType
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig

__all__ = ["LoraConfig", "PeftConfig", "PeftType", "TaskType", "XLoraConfig"]
