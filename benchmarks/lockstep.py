"""Greedy `generate` in lockstep against the two passes one after the other, where drafts are right and where not.

The experts here are random, so how often the base model's draft is the mixture's token is set by the global scaling
weight: 0 makes all drafts right, 1 nearly none. Several drafts a round are measured where half of them are right: that
shows from which share on they are cheaper than one.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models import Models
from loramix.pace import AHEAD
from loramix.speed import Contender, Measurement, interleave

LENGTH = 64
WEIGHTS = (0.0, 0.003, 0.02, 1.0)
DRAFTS = (3, AHEAD)


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement for each share of right drafts: each way alone, and as `generate` decides by itself."""
    new, model = min(LENGTH, models.size.lengths[-1]), models.loramix
    found: list[Measurement] = []
    weight = model.get_global_scaling_weight()
    for value in WEIGHTS:
        model.set_global_scaling_weight(value)
        model._loramix.paces.clear()
        reports: dict[str, Any] = {}

        def contender(name: str, net: Any, reports: dict[str, Any] = reports, **how: Any) -> Contender:
            def call() -> None:
                _generate(net, models.prompt, new, **how)
                reports[name] = getattr(net, "lockstep_report", None)

            return Contender(name, call)

        alone = contender("lockstep", model, lockstep=True)
        alone.call()
        share = reports["lockstep"].accepted
        several = [contender(f"{k} drafts", model, lockstep=k) for k in DRAFTS if share > 0.5]
        contenders = [
            contender("base", models.base),
            contender("two passes", model, lockstep=False),
            alone,
            *several,
            contender("loramix", model),
        ]
        times = interleave(contenders, rounds, warm_ups=2)
        forced, chosen = reports["lockstep"], reports["loramix"]
        limit = models.weights.generate_limit(models.size.prompt, new)
        facts = {
            "new": new,
            "tokens in common": new,
            "accepted": round(forced.accepted, 3),
            "forwards per token": round(forced.forwards_per_token, 3),
            "forwards per token, by itself": round(chosen.forwards_per_token, 3),
            "ways, by itself": dict(chosen.rounds),
            "against": "two passes",
        }
        found.append(Measurement(f"generate {new} tokens, experts × {value:g}", times, limit, facts=facts))
    model.set_global_scaling_weight(weight)
    return found


@torch.no_grad()
def _generate(model: Any, prompt: torch.Tensor, new: int, **how: Any) -> None:
    model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, **how)
