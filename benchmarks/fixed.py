"""Fixed routing: one pass with the experts beside the base model, and none of either once they are merged.

PEFT cannot fix its routing: beside them runs its forward, of two passes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.models import Models
from loramix.timing import Contender, Measurement, interleave

PEFT_EVERY = 4


def measure(models: Models, rounds: int) -> list[Measurement]:
    """A forward over the prompt: fixed, and merged."""
    model = models.loramix
    scalings = torch.full((models.size.experts,), 1 / models.size.experts)
    merged = copy.deepcopy(model)
    merged.fix_routing(scalings)
    merged = merged.merge_and_unload()

    @torch.no_grad()
    def forward(net: Any) -> None:
        net(input_ids=models.prompt)

    def fixed() -> None:
        with model.fixed_scalings(scalings):
            forward(model)

    weights = models.weights
    one_pass = (weights.backbone + weights.experts + weights.head) / (weights.backbone + weights.head)
    work, base = f"forward of {models.size.prompt} tokens", Contender("base", lambda: forward(models.base))
    theirs = Contender("PEFT", lambda: forward(models.peft), PEFT_EVERY)
    times = interleave([base, Contender("loramix", fixed), theirs], rounds, warm_ups=2)
    found = [Measurement(f"{work}, routing fixed", times, one_pass)]
    times = interleave([base, Contender("loramix", lambda: forward(merged)), theirs], rounds, warm_ups=2)
    return [*found, Measurement(f"{work}, merged", times, 1.0, 1.03)]
