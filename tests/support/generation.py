"""Generating with a tiny model, with and without a cache, and the ways to do it that tests go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loramix.decoding.report import LockstepReport
from support.tiny import tokens

NEW = 8
PADDING = torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
CACHED_ONLY = ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")
ROUTING: dict[str, Any] = {
    "layerwise_scalings": True,
    "scaling_pass_value": 0.2,
    "enable_softmax": False,
    "enable_softmax_topk": True,
    "top_k_lora": 2,
}


def ids_with_padding() -> Tensor:
    return tokens() * PADDING


MODES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "greedy": lambda _: {"input_ids": tokens()},
    "sampling": lambda _: {"input_ids": tokens(), "do_sample": True, "temperature": 1.5, "top_k": 20},
    "several sequences": lambda _: {"input_ids": tokens(), "do_sample": True, "num_return_sequences": 3},
    "beams": lambda _: {"input_ids": tokens(), "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": lambda _: {"input_ids": tokens(), "num_beams": 3, "do_sample": True},
    "left padding": lambda _: {"input_ids": ids_with_padding(), "attention_mask": PADDING},
    "padded beams": lambda _: {"input_ids": ids_with_padding(), "attention_mask": PADDING, "num_beams": 2},
    "one token": lambda _: {"input_ids": tokens(1, 1)},
    "embeddings": lambda base: {"inputs_embeds": base.get_input_embeddings()(tokens())},
    "padded embeddings": lambda base: {
        "inputs_embeds": base.get_input_embeddings()(ids_with_padding()),
        "attention_mask": PADDING,
    },
    "embeddings and ids": lambda base: {
        "input_ids": tokens(),
        "inputs_embeds": base.get_input_embeddings()(tokens()),
    },
    "static cache": lambda _: {"input_ids": tokens(), "cache_implementation": "static"},
    "padded static cache": lambda _: {
        "input_ids": ids_with_padding(),
        "attention_mask": PADDING,
        "cache_implementation": "static",
    },
    "static cache and beams": lambda _: {"input_ids": tokens(), "num_beams": 2, "cache_implementation": "static"},
    "prefill in chunks": lambda _: {"input_ids": tokens(), "prefill_chunk_size": 4},
    "prompt lookup": lambda _: {"input_ids": tokens(1).repeat(1, 2), "prompt_lookup_num_tokens": 3},
}
"""Ways to generate; the base model is given."""

DRAFTED: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"input_ids": tokens(1)},
    "batch": lambda: {"input_ids": tokens(3)},
    "left padding": lambda: {"input_ids": ids_with_padding(), "attention_mask": PADDING},
    "sampling": lambda: {"input_ids": tokens(2), "do_sample": True, "temperature": 1.5, "top_k": 20},
    "several sequences": lambda: {"input_ids": tokens(1), "do_sample": True, "num_return_sequences": 3},
    "penalties": lambda: {"input_ids": tokens(2), "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "one token": lambda: {"input_ids": tokens(1, 1)},
    "in chunks": lambda: {"input_ids": tokens(2), "prefill_chunk_size": 4},
    "an end": lambda: {"input_ids": tokens(4), "eos_token_id": 30, "pad_token_id": 0},
}
"""What is decoded with drafts."""


def generated(model: Any, **inputs: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, **inputs})


def recomputed(model: Any, **inputs: Any) -> Tensor:
    plain = {name: value for name, value in inputs.items() if name not in CACHED_ONLY}
    return generated(model, use_cache=False, **plain)


def report_of(model: Any) -> LockstepReport:
    assert model.lockstep_report is not None
    return model.lockstep_report


def random_text(length: int, seed: int = 11) -> list[int]:
    """Token ids that no model would write, none of them special."""
    return tokens(1, length, seed=seed)[0].tolist()


def forced(text: Callable[[int], int | None]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that chooses `text(n)` as the n-th token; None leaves it to the model."""

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        token = text(ids.shape[1])
        return scores if token is None else torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([token]), 0.0)

    return choose
