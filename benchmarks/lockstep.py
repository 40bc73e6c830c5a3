"""Greedy `generate` in lockstep against the two passes one after the other, where drafts are right and where not.

The experts here are random, so how often the base model's draft is the mixture's token is set by the global scaling
weight: 0 makes all drafts right, 1 nearly none.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import Models
from loramix.speed import Contender, Measurement, interleave

LENGTH = 64
CASES = {"drafts right": 0.0, "drafts wrong": 1.0}


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Two measurements for each share of right drafts: all in lockstep, and as `generate` decides by itself."""
    new, model = min(LENGTH, models.size.lengths[-1]), models.loramix
    found: list[Measurement] = []
    weight = model.get_global_scaling_weight()
    for case, value in CASES.items():
        model.set_global_scaling_weight(value)
        model._loramix.paces.clear()
        reports: dict[str, Any] = {}

        def contender(name: str, net: Any, reports: dict[str, Any] = reports, **how: Any) -> Contender:
            def call() -> None:
                _generate(net, models.prompt, new, **how)
                reports[name] = getattr(net, "lockstep_report", None)

            return Contender(name, call)

        contenders = [
            contender("base", models.base),
            contender("two passes", model, lockstep=False),
            contender("lockstep", model, lockstep=True),
            contender("loramix", model),
        ]
        times = interleave(contenders, rounds, warm_ups=3)
        forced, chosen = reports["lockstep"], reports["loramix"]
        limit = models.weights.generate_limit(models.size.prompt, new)
        facts = {
            "new": new,
            "tokens in common": new,
            "accepted": round(forced.accepted, 3),
            "forwards per token": round(forced.forwards_per_token, 3),
            "forwards per token, by itself": round(chosen.forwards_per_token, 3),
            "against": "two passes",
        }
        found.append(Measurement(f"generate {new} tokens, {case}", times, limit, facts=facts))
    model.set_global_scaling_weight(weight)
    return found


@torch.no_grad()
def _generate(model: Any, prompt: torch.Tensor, new: int, **how: Any) -> None:
    model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, **how)
