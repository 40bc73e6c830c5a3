"""One token after the prompt, with a cache: what `generate` does for each token, without its loop.

PEFT has no cache: its step is a forward over the text so far, with logits at the last token only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import Models
from loramix.timing import Contender, Measurement, interleave

PEFT_EVERY = 10


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement, for each row of the prompt at once."""
    length = models.prompt.shape[1]
    contenders = [
        Contender("base", one_token(models.base, models.prompt)),
        Contender("loramix", one_token(models.loramix, models.prompt)),
        Contender("PEFT", _step_without_cache(models.peft, models.prompt), PEFT_EVERY),
    ]
    times = interleave(contenders, rounds, warm_ups=3)
    limit = models.weights.limit(1, 1, models.size.attention(length + 1))
    return [Measurement(f"one token after {length}", times, limit)]


def one_token(model: Any, prompt: torch.Tensor) -> Callable[[], None]:
    """One token after a prompt, with a cache that is cropped again."""
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    token = prompt[:, -1:]

    def step() -> None:
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def _step_without_cache(model: Any, prompt: torch.Tensor) -> Callable[[], None]:
    text = torch.cat([prompt, prompt[:, -1:]], dim=1)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=text, logits_to_keep=1)

    return step
