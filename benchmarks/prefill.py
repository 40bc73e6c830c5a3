"""A prompt is read: with a cache, and logits at its last token only; PEFT has no cache.

A forward with logits at every token and no cache runs beside it.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import Models
from loramix.timing import Contender, Measurement, interleave

LENGTHS = (128, 256, 512, 1024, 2048)
LONG = 1024  # from here on, half the rounds
PEFT_EVERY = FORWARD_EVERY = 2


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement for each length of the prompt."""
    small = models.size.hidden < 512
    return [
        _measure(models, length, rounds if small or length < LONG else max(2, rounds // 2))
        for length in ((4, 8) if small else LENGTHS)
    ]


def _measure(models: Models, length: int, rounds: int) -> Measurement:
    ids = torch.randint(models.size.vocabulary, (1, length), generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def call(model: Any, **how: Any) -> None:
        model(input_ids=ids, **how)

    prefill: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    contenders = [
        Contender("base", lambda: call(models.base, **prefill)),
        Contender("loramix", lambda: call(models.loramix, **prefill)),
        Contender("PEFT", lambda: call(models.peft, logits_to_keep=1), PEFT_EVERY),
        Contender("base, forward", lambda: call(models.base, use_cache=False), FORWARD_EVERY),
        Contender("loramix, forward", lambda: call(models.loramix, use_cache=False), FORWARD_EVERY),
    ]
    times = interleave(contenders, rounds)
    attention = models.size.attention((length + 1) / 2)
    facts = {"text": length, "forward limit": models.weights.limit(length, length, attention)}
    limit = models.weights.limit(length, 1, attention)
    return Measurement(f"prefill of {length} tokens", times, limit, facts=facts)
