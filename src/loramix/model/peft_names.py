"""Methods and arguments of PEFT's models that are refused here, each with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from loramix.errors import UnsupportedOperationError

ADAPTER_NAMES = "adapter_names"
_BUILD = "get_peft_model(base, XLoraConfig(adapters={…})) with all experts"
_FIXED = "fixed_scalings([…]) to run chosen experts only"
_PROMPTS = "experts alone: a mixture learns no prompts"
REFUSED: Mapping[str, str] = {
    "add_adapter": _BUILD,
    "add_weighted_adapter": "fix_routing([0.5, …]), then save_fixed(folder) to write the sum as one adapter",
    "delete_adapter": "unload(), unload_mixture(name), or build the mixture anew without the expert",
    "disable_adapters": "disable_adapter_layers(), or the context manager disable_adapter()",
    "enable_adapters": "enable_adapter_layers()",
    "get_adapter_state_dict": "save_pretrained(folder)",
    "get_layer_status": "adapted_modules and expert_names",
    "get_model_config": "config.to_dict()",
    "get_model_status": "peft_config, expert_names and print_trainable_parameters()",
    "get_prompt": _PROMPTS,
    "get_prompt_embedding_to_save": _PROMPTS,
    "inject_adapter": _BUILD,
    "load_adapter": "PeftModel.from_pretrained(base, checkpoint, adapters={…}) to replace experts, or "
    "load_mixture(folder, name) for another mixture",
    "merge_adapter": "merge_and_unload(), inside fixed_scalings([…]) for a mixture",
    "prepare_model_for_gradient_checkpointing": "gradient_checkpointing_enable(), which needs no more than this",
    "set_adapter": f"{_FIXED}, or use_mixture(name) for another mixture",
    "set_requires_grad": "XLoraConfig(use_trainable_adapters=True) when the mixture is built",
    "subtract_mutated_init": "save_pretrained(folder)",
    "supports_lora_conversion": "save_fixed(folder), which writes fixed scalings as one LoRA adapter",
    "unmerge_adapter": "the model before merge_and_unload(): nothing is merged while experts are there",
}
"""Methods of PEFT's models that a mixture does not have, and what to use instead."""


class RefusedMethods:
    """The methods of PEFT's models that a mixture does not have: each raises an error that names another way."""


def _refused(name: str, remedy: str) -> Any:
    def refuse(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOperationError(
            "A mixture's experts are fixed when it is built.", received=f"{name}()", remedy=f"use {remedy}"
        )

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Not supported: use {remedy}."
    return refuse


for _name, _remedy in REFUSED.items():
    setattr(RefusedMethods, _name, _refused(_name, _remedy))


def refuse_adapter_names(arguments: Mapping[str, Any]) -> None:
    """Raises UnsupportedOperationError: an adapter for each text, as PEFT's forward and generate take them."""
    if arguments.get(ADAPTER_NAMES) is not None:
        raise UnsupportedOperationError(
            "A mixture's router, or fixed scalings, say which experts act.",
            received=f"{ADAPTER_NAMES}={arguments[ADAPTER_NAMES]!r}",
            remedy="leave it out, and use fixed_scalings([…]) for one expert alone, text by text",
        )
