"""One token of batch 1 after the prompt, with a cache: what `generate` does for each token, without its loop."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import Models
from loramix.speed import Contender, Measurement, interleave


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement; PEFT has no cache and takes no part."""
    contenders = [
        Contender("base", _step(models.base, models.prompt)),
        Contender("loramix", _step(models.loramix, models.prompt)),
    ]
    times = interleave(contenders, rounds, warm_ups=3)
    return [Measurement(f"one token after {models.size.prompt}", times, models.weights.limit(1, 1))]


def _step(model: Any, prompt: torch.Tensor) -> Any:
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
    token = prompt[:, -1:]

    def step() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step
