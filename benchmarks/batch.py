"""How a forward and a decoded token grow with the number of texts read at once."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import decode, forward
from benchmarks.models import Models
from loramix.timing import Measurement

BATCHES = (1, 2, 4, 8, 16)
LARGE = 8  # from here on, a forward has fewer rounds
FORWARD_ROUNDS, FEWER = 5, 3
PEFT_EVERY = 2


def measure(models: Models, rounds: int) -> list[Measurement]:
    """A forward over the prompts and one token after them, for each batch size; loramix makes two passes."""
    found: list[Measurement] = []
    for batch in BATCHES if models.size.hidden >= 512 else (1, 2):
        shape = (batch, models.size.prompt)
        prompt = torch.randint(models.size.vocabulary, shape, generator=torch.Generator().manual_seed(3))
        chosen = replace(models, prompt=prompt)
        turns = min(rounds, FORWARD_ROUNDS if batch < LARGE else FEWER)
        for measured in (*forward.measure(chosen, turns, PEFT_EVERY), *decode.measure(chosen, rounds)):
            name = f"{measured.work}, batch {batch}"
            found.append(replace(measured, work=name, target=None, facts={"batch": batch}))
    return found
