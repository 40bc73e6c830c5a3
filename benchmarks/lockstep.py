"""Greedy `generate` in lockstep against the two passes one after the other, where drafts are right and where not.

The experts here are random, so how often the base model's draft is the mixture's token is set by the global scaling
weight: 0 makes all drafts right, 1 nearly none. Several drafts a round are measured where half of them are right: that
shows from which share on they are cheaper than one. Random models repeat themselves; a last case samples, so hot that
no draft is right and nothing comes again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.generate import LENGTH, in_common, write
from benchmarks.models import Models
from loramix.decoding.strategies.speculative import DRAFTS as WINDOW
from loramix.timing import Contender, Measurement, interleave

WEIGHTS = (0.0, 0.003, 0.02, 1.0)
DRAFTS = (3, WINDOW)


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement for each share of right drafts: each strategy alone, and as `generate` decides by itself."""
    new, model = min(LENGTH, models.size.lengths[-1]), models.loramix
    found: list[Measurement] = []
    weight = model.get_global_scaling_weight()
    for value in WEIGHTS:
        model.set_global_scaling_weight(value)
        model._loramix.measurements.clear()
        reports, texts = dict[str, Any](), dict[str, Tensor]()

        def contender(
            name: str, net: Any, reports: dict[str, Any] = reports, texts: dict[str, Tensor] = texts, **how: Any
        ) -> Contender:
            def call() -> None:
                texts[name] = write(net, models.prompt, new, **how)
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
            "tokens in common": min(
                in_common(text, texts["two passes"]) for name, text in texts.items() if name != "base"
            ),
            "accepted": round(forced.accepted, 3),
            "forwards per token": round(forced.forwards_per_token, 3),
            "forwards per token, by itself": round(chosen.forwards_per_token, 3),
            "rounds, by itself": dict(chosen.rounds),
            "against": "two passes",
        }
        found.append(Measurement(f"generate {new} tokens, experts × {value:g}", times, limit, facts=facts))
    model.set_global_scaling_weight(weight)
    return [*found, _sampled(models, rounds, new)]


def _sampled(models: Models, rounds: int, new: int) -> Measurement:
    """What finding out that no draft is right costs."""
    model, reports, texts = models.loramix, list[Any](), dict[str, Tensor]()
    model._loramix.measurements.clear()

    def contender(name: str, net: Any, **how: Any) -> Contender:
        def call() -> None:
            torch.manual_seed(0)
            texts[name] = write(net, models.prompt, new, do_sample=True, temperature=100.0, **how)
            if name == "loramix":
                reports.append(net.lockstep_report)

        return Contender(name, call)

    contenders = [
        contender("base", models.base),
        contender("two passes", model, lockstep=False),
        contender("loramix", model),
    ]
    times = interleave(contenders, rounds, warm_ups=2)
    tokens, forwards, drafts, accepted = (
        sum(getattr(report, name) for report in reports) for name in ("tokens", "forwards", "drafts", "accepted_drafts")
    )
    facts = {
        "new": new,
        "tokens in common": in_common(texts["loramix"], texts["two passes"]),
        "accepted": round(accepted / max(1, drafts), 3),
        "forwards per token": round(forwards / tokens, 3),
        "against": "two passes",
    }
    limit = models.weights.generate_limit(models.size.prompt, new)
    return Measurement(f"sample {new} tokens at temperature 100", times, limit, facts=facts)
