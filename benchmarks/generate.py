"""Greedy `generate` of 64 tokens after the prompt: the base model and loramix with a cache, PEFT, which has none."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import Models
from loramix.speed import Contender, Measurement, interleave

LENGTH = 64
TARGET = 2.3
PEFT_EVERY = 4


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement, at 64 new tokens (at the longest length, if that is shorter)."""
    return [measure_length(models, min(LENGTH, models.size.lengths[-1]), rounds, target=TARGET)]


def measure_length(models: Models, new: int, rounds: int, *, target: float | None = None) -> Measurement:
    """Generate `new` tokens. `facts` says how many tokens the mixtures have in common before they part."""
    texts: dict[str, list[int]] = {}

    def contender(name: str, model: Any, every: int = 1) -> Contender:
        def call() -> None:
            texts[name] = generate(model, models.prompt, new)

        return Contender(name, call, every)

    contenders = [
        contender("base", models.base),
        contender("loramix", models.loramix),
        contender("PEFT", models.peft, PEFT_EVERY),
    ]
    times = interleave(contenders, rounds)
    equal = [a == b for a, b in zip(texts["loramix"], texts["PEFT"], strict=True)]
    common = equal.index(False) if False in equal else new
    facts = {"prompt": models.size.prompt, "new": new, "tokens in common": common}
    return Measurement(
        f"generate {new} tokens", times, models.weights.generate_limit(models.size.prompt, new), target, facts
    )


def generate(model: Any, prompt: torch.Tensor, new: int) -> list[int]:
    """Greedy, `new` tokens, no end-of-sequence token."""
    mask = torch.ones_like(prompt)
    tokens = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return tokens[0, prompt.shape[1] :].tolist()
