"""Where drafts leave every token as it is, and the reason where they might not.

A row that is one token ahead must change nothing for the other rows, and what a layer attends to must follow from the
mask it is given. That holds for the model classes below, each of which the tests decode with and without drafts, but
for the cases that are excepted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from loramix._compat import CACHE
from loramix.decoding.choice import Choice
from loramix.decoding.strategies import Sequential
from loramix.experts.base_model import text_config
from loramix.passes.cache import TwoPassCache
from loramix.passes.state import MixtureState

MODELS = frozenset(
    {
        *("cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral"),
        *("olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"),
    }
)
INPUTS = frozenset(
    {
        *("input_ids", "attention_mask", "position_ids", CACHE, "use_cache", "return_dict"),
        *("logits_to_keep", "cache_position"),  # transformers before 5.4 counts its slots there: those of the cache
    }
)
ATTENTION = frozenset({"full_attention", "sliding_attention"})


def why_not_this_generation(
    model: Any, mixture: MixtureState, choice: Choice, generation_config: Any, cache: Any
) -> str | None:
    """The reason against a session that holds for a whole generation; None where there is none.

    Args:
        model: the mixture.
        mixture: its state.
        choice: how to decode.
        generation_config: transformers', complete.
        cache: the one that the generation will fill.
    """
    config = text_config(model.config)
    settings = str(getattr(config, "rope_parameters", None)) + str(getattr(config, "rope_scaling", None))
    reasons = {
        "it was not wanted": isinstance(choice, Sequential) and mixture.fixed_after is None,
        "there is only one pass": mixture.single_pass() is not None or not mixture.needs_scaling_pass,
        "the model is in training mode, where dropout draws for each pass": model.training,
        f"{config.model_type} models have not been shown to be exact": config.model_type not in MODELS,
        "rotary frequencies depend on the longest text of a batch": "dynamic" in settings or "longrope" in settings,
        "the router's logits of a mixture of experts are asked for": getattr(config, "output_router_logits", False),
        "attentions or hidden states are asked for": generation_config.output_attentions
        or generation_config.output_hidden_states,
        "there is no cache": not generation_config.use_cache or cache is None,
        "the cache is a static one": getattr(cache, "is_compileable", False),
        "the cache is offloaded": getattr(cache, "offloading", False),
        "an assistant, or a device that stops late, decodes": generation_config.is_assistant
        or model.device.type == "mps",
        "a module of the model has a forward hook, which would see both passes' rows": _has_foreign_hooks(model),
        "the attention takes no masks": getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"),
        "the model has attention of other kinds than full and sliding": not _attention_kinds(config) <= ATTENTION,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_not_this_token(model: Any, mixture: MixtureState, inputs: Mapping[str, Any]) -> str | None:
    """The reason against a session that the first token after the prompt gives; None where there is none.

    Args:
        model: the mixture.
        mixture: its state.
        inputs: the arguments of its forward.
    """
    cache, positions = inputs[CACHE], inputs.get("position_ids")
    unknown = sorted(name for name, value in inputs.items() if value is not None and name not in INPUTS)
    if unknown:
        return f"the model is given {', '.join(unknown)}"
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return "positions are not one number for each token"
    if not isinstance(cache, TwoPassCache) or cache.owner != mixture.owner or cache.torn:
        return "there is no cache of both passes"
    kinds = {type(layer) for half in (cache, cache.base) for layer in half.layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return f"the cache is made of {', '.join(sorted(kind.__name__ for kind in kinds))}"
    expected = _is_sliding(text_config(model.config), len(cache.layers))
    if [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers] != expected:
        return "the cache does not know the windows of the model's attention"
    return None


def _attention_kinds(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _is_sliding(config: Any, blocks: int) -> list[bool]:
    """Whether each block's attention has a sliding window."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return [getattr(config, "sliding_window", None) is not None] * blocks
    return [kind == "sliding_attention" for kind in kinds]


def _has_foreign_hooks(model: nn.Module) -> bool:
    """Whether somebody's hook would see the rows; transformers leaves some of its own, which record nothing here."""
    hooks = (
        hook
        for module in model.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
        for hook in registered.values()
    )
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)
