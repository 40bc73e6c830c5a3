"""One training step of the router alone: forward, loss and backward, against the base model's forward."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Contender, Measurement, interleave
from benchmarks.models import Models
from loramix.training import ScalingPassCache, required_bytes

MARGIN = 1.15  # on the arithmetic limit
BATCH, TOKENS = 4, 256
PEFT_EVERY = 2


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Two measurements: with the scaling pass run in each step, and with its hidden states kept."""
    length = min(TOKENS, 4 * models.size.prompt)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(models.size.vocabulary, (BATCH, length), generator=generator)

    def forward() -> None:
        with torch.no_grad():
            models.base(input_ids=ids, labels=ids)

    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    for model in (models.loramix, models.peft):
        model.train()
    try:
        base = Contender("base", forward)
        plain = [base, Contender("loramix", lambda: step(models.loramix))]
        plain.append(Contender("PEFT", lambda: step(models.peft), every=PEFT_EVERY))
        limit = models.weights.training_limit(scaling_passes=1)
        work = f"router step, {BATCH} × {length} tokens"
        found = [Measurement(work, interleave(plain, rounds), limit, MARGIN * limit)]
        limit = models.weights.training_limit(scaling_passes=0)
        with ScalingPassCache(models.loramix, max_bytes=required_bytes(models.loramix, ids.numel())):
            kept = [base, Contender("loramix", lambda: step(models.loramix))]
            times = interleave(kept, rounds)
        return [*found, Measurement(f"{work}, scaling pass kept", times, limit, MARGIN * limit)]
    finally:
        for model in (models.loramix, models.peft):
            model.zero_grad(set_to_none=True)
            model.eval()
