"""What `generate` costs by itself where no draft is right, against the two passes one after the other.

The text is forced on the models: random tokens, which neither pass would choose and no part of which comes again. The
vocabulary is small, so that no head hides what drafts cost, and each layer has scalings of its own.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generate import in_common, write
from benchmarks.models import Models, build
from loramix.timing import Contender, Measurement, interleave

VOCABULARY = 4096
LENGTHS = (32, 64, 128)


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement for each number of new tokens; `first` is a generation for which nothing is measured yet."""
    small = models.size.hidden < 512
    size = replace(models.size, layerwise=True, vocabulary=models.size.vocabulary if small else VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        chosen = build(size, Path(folder))
    return [_measure(chosen, new, rounds) for new in (models.size.lengths if small else LENGTHS)]


def _measure(models: Models, new: int, rounds: int) -> Measurement:
    mixture, texts, reports = models.loramix, dict[str, Tensor](), dict[str, Any]()
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(models.size.vocabulary, (models.size.prompt + new,), generator=generator).tolist()

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf")).index_fill_(1, torch.tensor([text[ids.shape[1]]]), 0.0)

    def contender(name: str, net: Any, *, first: bool = False, **how: Any) -> Contender:
        def call() -> None:
            if first:
                mixture._loramix.measurements.clear()
            texts[name] = write(net, models.prompt, new, logits_processor=[force], **how)
            reports[name] = mixture.lockstep_report

        return Contender(name, call)

    contenders = [
        contender("base", models.base),
        contender("two passes", mixture, lockstep=False),
        contender("first", mixture, first=True),
        contender("loramix", mixture),
    ]
    times = interleave(contenders, rounds, warm_ups=2)
    report = reports["loramix"]
    facts = {
        "new": new,
        "tokens in common": min(in_common(found, texts["two passes"]) for found in texts.values()),
        "accepted": 0.0 if not report.drafts else round(report.accepted, 3),
        "forwards per token": round(report.forwards_per_token, 3),
        "row-forwards / two passes": round(report.row_forwards / (2 * report.tokens), 3),
        "against": "two passes",
    }
    limit = models.weights.generate_limit(models.size.prompt, new)
    return Measurement(f"{new} forced tokens", times, limit, facts=facts)
