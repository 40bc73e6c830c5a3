"""One forward over the prompt, with logits at every token."""

from __future__ import annotations

import torch

from benchmarks.models import Models
from loramix.timing import Contender, Measurement, interleave

MARGIN = 1.1  # on the arithmetic limit


def measure(models: Models, rounds: int, peft_every: int = 1) -> list[Measurement]:
    """One measurement, for each row of the prompt at once."""

    def forward(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model(input_ids=models.prompt)

    contenders = [
        Contender("base", lambda: forward(models.base)),
        Contender("loramix", lambda: forward(models.loramix)),
        Contender("PEFT", lambda: forward(models.peft), peft_every),
    ]
    limit = models.weights.forward_limit()
    times = interleave(contenders, rounds, warm_ups=2)
    return [Measurement(f"forward of {models.size.prompt} tokens", times, limit, MARGIN * limit)]
