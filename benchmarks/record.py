"""What recording the routing costs: where none was ever made, where one has ended, and inside one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.generate import LENGTH, write
from benchmarks.models import Models
from loramix.analysis import record_routing
from loramix.timing import Contender, Measurement, interleave


def measure(models: Models, rounds: int) -> list[Measurement]:
    """A forward over the prompt, and `generate` in two passes."""
    fresh, ended, recorded = (copy.deepcopy(models.loramix) for _ in range(3))
    new = min(LENGTH, models.size.lengths[-1])

    @torch.no_grad()
    def forward(model: Any) -> None:
        model(input_ids=models.prompt)

    def generate(model: Any) -> None:
        write(model, models.prompt, new, **({} if model is models.base else {"lockstep": False}))

    def within(call: Callable[[Any], None]) -> None:
        with record_routing(recorded, max_tokens=100_000):
            call(recorded)

    found: list[Measurement] = []
    works = {
        f"forward of {models.size.prompt} tokens": (forward, models.weights.forward_limit()),
        f"generate {new} tokens": (generate, models.weights.generate_limit(models.size.prompt, new)),
    }
    for work, (call, limit) in works.items():
        with record_routing(ended):
            call(ended)
        contenders = [
            Contender("base", lambda call=call: call(models.base)),
            Contender("loramix", lambda call=call: call(fresh)),
            Contender("record ended", lambda call=call: call(ended)),
            Contender("recorded", lambda call=call: within(call)),
        ]
        times = interleave(contenders, rounds, warm_ups=2)
        found.append(Measurement(work, times, limit))
    return found
