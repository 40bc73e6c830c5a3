"""How a forward and a decoded token grow with the number of texts read at once."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import decode, forward
from benchmarks.models import Models
from loramix.speed import Measurement

BATCHES = (1, 2, 4, 8, 16)
FORWARD_ROUNDS = 5


def measure(models: Models, rounds: int) -> list[Measurement]:
    """A forward over the prompts and one token after them, for each batch size; loramix makes two passes."""
    found: list[Measurement] = []
    for batch in BATCHES if models.size.hidden >= 512 else (1, 2):
        shape = (batch, models.size.prompt)
        prompt = torch.randint(models.size.vocabulary, shape, generator=torch.Generator().manual_seed(3))
        chosen = replace(models, prompt=prompt)
        for work, turns in ((forward, min(rounds, FORWARD_ROUNDS)), (decode, rounds)):
            measured = work.measure(chosen, turns)[0]
            name = f"{measured.work}, batch {batch}"
            found.append(replace(measured, work=name, target=None, facts={"batch": batch}))
    return found
