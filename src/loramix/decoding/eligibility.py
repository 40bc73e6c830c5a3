"""Whether a generation may use drafts, and the reason if it may not.

Drafts are exact if a row that is one token ahead changes nothing in the other rows, and if the mask alone decides what
a layer attends to. That holds for the model types below, which the tests decode with and without drafts, except in the
cases excluded here.
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
        *("logits_to_keep", "cache_position"),  # transformers before 5.4 passes the slots of the cache
    }
)
ATTENTION = frozenset({"full_attention", "sliding_attention"})


def why_not_this_generation(
    model: Any, mixture: MixtureState, choice: Choice, generation_config: Any, cache: Any
) -> str | None:
    """The reason why a generation cannot have a session; None if it can.

    Args:
        model: the mixture.
        mixture: its state.
        choice: how to decode.
        generation_config: the complete generation configuration.
        cache: the cache that the generation will fill.
    """
    config = text_config(model.config)
    settings = str(getattr(config, "rope_parameters", None)) + str(getattr(config, "rope_scaling", None))
    reasons = {
        "sequential decoding was requested": isinstance(choice, Sequential) and mixture.fixed_after is None,
        "there is only one pass": mixture.single_pass() is not None or not mixture.needs_scaling_pass,
        "a layer sees the tokens in the cache": bool(mixture.uses.seeing_cached),
        "the model is in training mode, where dropout draws for each pass": model.training,
        f"{config.model_type} models have not been shown to be exact": config.model_type not in MODELS,
        "rotary frequencies depend on the longest text of a batch": "dynamic" in settings or "longrope" in settings,
        "router logits of a sparse base model are requested": getattr(config, "output_router_logits", False),
        "attentions or hidden states are requested": generation_config.output_attentions
        or generation_config.output_hidden_states,
        "there is no cache": not generation_config.use_cache or cache is None,
        "the cache is static": getattr(cache, "is_compileable", False),
        "the cache is offloaded": getattr(cache, "offloading", False),
        "the model decodes as an assistant": generation_config.is_assistant,
        "on mps, transformers checks for the end of the text one token late": model.device.type == "mps",
        "a module of the model has a forward hook, which would see both passes' rows": _has_foreign_hooks(model),
        "the attention takes no masks": getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"),
        "the model has attention other than full and sliding-window": not _attention_kinds(config) <= ATTENTION,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_not_this_token(model: Any, mixture: MixtureState, inputs: Mapping[str, Any]) -> str | None:
    """The reason, seen at the first token after the prompt, why there can be no session; None if there can.

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
        return "position_ids is not one number for each token"
    if not isinstance(cache, TwoPassCache) or cache.owner != mixture.owner or cache.torn:
        return "the cache does not hold both passes"
    kinds = {type(layer) for half in (cache, cache.base) for layer in half.layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return f"the cache has layers of {', '.join(sorted(kind.__name__ for kind in kinds))}"
    expected = _is_sliding(text_config(model.config), len(cache.layers))
    if [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers] != expected:
        return "the cache's layers do not match the model's sliding windows"
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
    """Whether a hook would see the rows, other than those that transformers leaves behind: they record nothing here."""
    hooks = (
        hook
        for module in model.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
        for hook in registered.values()
    )
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)
