"""Mixtures of LoRA experts (X-LoRA, arXiv 2402.07148) for Hugging Face models.

The public names are imported when they are first used: `import loramix` itself loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramix._lazy import loaded_at_first_use
from loramix._versions import __version__, check_versions

if TYPE_CHECKING:
    from loramix.config.base import PeftConfig, PeftType, TaskType
    from loramix.config.lora import LoraConfig
    from loramix.config.xlora import XLoraConfig
    from loramix.errors import (
        AdapterError,
        AdapterMismatchError,
        AdapterNameError,
        CacheError,
        CheckpointError,
        CheckpointNotFoundError,
        ConfigurationError,
        CorruptCheckpointError,
        DataError,
        IncompleteCheckpointError,
        LoramixError,
        ModelError,
        RoutingError,
        SaveError,
        TrainingError,
        UnsupportedAdapterError,
        UnsupportedOperationError,
        VersionError,
    )
    from loramix.layers.layer import XLoraLayer
    from loramix.model.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from loramix.model.build import PeftModel, XLoraModel, get_peft_model
    from loramix.model.kbit import prepare_model_for_kbit_training
    from loramix.model.reference import create_reference_model
    from loramix.passes.cache import TwoPassCache
    from loramix.routers.classifier import XLoraClassifier

check_versions()

__all__ = [
    "AdapterError",
    "AdapterMismatchError",
    "AdapterNameError",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CacheError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigurationError",
    "CorruptCheckpointError",
    "DataError",
    "IncompleteCheckpointError",
    "LoraConfig",
    "LoramixError",
    "ModelError",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "RoutingError",
    "SaveError",
    "TaskType",
    "TrainingError",
    "TwoPassCache",
    "UnsupportedAdapterError",
    "UnsupportedOperationError",
    "VersionError",
    "XLoraClassifier",
    "XLoraConfig",
    "XLoraLayer",
    "XLoraModel",
    "__version__",
    "create_reference_model",
    "get_peft_model",
    "prepare_model_for_kbit_training",
]

_HOMES = {
    "XLoraClassifier": "routers.classifier",
    "TwoPassCache": "passes.cache",
    "XLoraLayer": "layers.layer",
    "create_reference_model": "model.reference",
    "LoraConfig": "config.lora",
    "XLoraConfig": "config.xlora",
    **dict.fromkeys(("PeftConfig", "PeftType", "TaskType"), "config.base"),
    **dict.fromkeys(("PeftModel", "XLoraModel", "get_peft_model"), "model.build"),
    "prepare_model_for_kbit_training": "model.kbit",
    **dict.fromkeys((name for name in __all__ if name.startswith("AutoPeft")), "model.auto"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
}

__getattr__ = loaded_at_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
