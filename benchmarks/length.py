"""One token with a cache after a short text and after a long one: what grows is attention, as in the base model."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import decode
from benchmarks.models import Models
from loramix.timing import Measurement

LENGTHS = (128, 512, 2048)


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement for each length."""
    lengths = LENGTHS if models.size.hidden >= 512 else (4, 8)
    found: list[Measurement] = []
    for length in lengths:
        prompt = torch.randint(models.size.vocabulary, (1, length), generator=torch.Generator().manual_seed(2))
        chosen = replace(models, prompt=prompt, size=replace(models.size, prompt=length))
        found.append(replace(decode.measure(chosen, rounds)[0], facts={"text": length}))
    return found
