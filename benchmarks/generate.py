"""Greedy `generate` of 64 tokens after the prompt: the base model and loramix with a cache, PEFT, which has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Models
from loramix.timing import Contender, Measurement, interleave

LENGTH = 64
TARGET = 2.3
PEFT_EVERY = 4


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement, at 64 new tokens (at the longest length, if that is shorter)."""
    return [measure_length(models, min(LENGTH, models.size.lengths[-1]), rounds, target=TARGET)]


def measure_length(models: Models, new: int, rounds: int, *, target: float | None = None) -> Measurement:
    """Generate `new` tokens. `facts` says how many tokens the mixtures have in common before they part."""
    texts: dict[str, Tensor] = {}

    def contender(name: str, model: Any, every: int = 1) -> Contender:
        def call() -> None:
            texts[name] = write(model, models.prompt, new)

        return Contender(name, call, every)

    contenders = [
        contender("base", models.base),
        contender("loramix", models.loramix),
        contender("PEFT", models.peft, PEFT_EVERY),
    ]
    times = interleave(contenders, rounds)
    common = in_common(texts["loramix"], texts["PEFT"])
    facts = {"prompt": models.size.prompt, "new": new, "tokens in common": common}
    return Measurement(
        f"generate {new} tokens", times, models.weights.generate_limit(models.size.prompt, new), target, facts
    )


@torch.no_grad()
def write(model: Any, prompt: Tensor, new: int, *, do_sample: bool = False, **how: Any) -> Tensor:
    """What a model writes after a prompt; greedy unless it is to sample."""
    mask = torch.ones_like(prompt)
    ids = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=new, do_sample=do_sample, **how)
    return ids[0, prompt.shape[1] :]


def in_common(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts have in common before they part."""
    return int((one == other).int().cumprod(0).sum())
