"""One training step of the router alone: forward, loss and backward.

Its time is compared with that of the base model's forward, its memory against the base model's own training forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Models
from loramix import XLoraLayer
from loramix.timing import Contender, Measurement, Samples, interleave, peak_bytes
from loramix.training import ScalingPassCache, required_bytes

MARGIN = 1.15  # on the arithmetic limit
BATCH, TOKENS = 4, 256
PEFT_EVERY = 2


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Three measurements: time with the scaling pass run in each step, and with its hidden states kept; memory."""
    length = min(TOKENS, 4 * models.size.prompt)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(models.size.vocabulary, (BATCH, length), generator=generator)

    def forward() -> None:
        with torch.no_grad():
            models.base(input_ids=ids, labels=ids)

    for model in (models.loramix, models.peft):
        model.train()
    try:
        base = Contender("base", forward)
        plain = [base, Contender("loramix", lambda: _step(models.loramix, ids))]
        plain.append(Contender("PEFT", lambda: _step(models.peft, ids), every=PEFT_EVERY))
        limit = models.weights.training_limit(scaling_passes=1)
        work = f"router step, {BATCH} × {length} tokens"
        found = [Measurement(work, interleave(plain, rounds), limit, MARGIN * limit)]
        limit = models.weights.training_limit(scaling_passes=0)
        with ScalingPassCache(models.loramix, max_bytes=required_bytes(models.loramix, ids.numel())):
            kept = [base, Contender("loramix", lambda: _step(models.loramix, ids))]
            times = interleave(kept, rounds)
        found.append(Measurement(f"{work}, scaling pass kept", times, limit, MARGIN * limit))
        return [*found, _memory(models, ids, f"{work}, memory")]
    finally:
        for model in (models.loramix, models.peft):
            model.zero_grad(set_to_none=True)
            model.eval()


def _step(model: Any, ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()


def _memory(models: Models, ids: Tensor, work: str) -> Measurement:
    embed: Any = models.base.get_input_embeddings()

    def base_step() -> None:
        models.base(inputs_embeds=embed(ids).detach().requires_grad_(), labels=ids).loss.backward()

    models.base.requires_grad_(False).train()
    try:
        base = peak_bytes(base_step)
    finally:
        models.base.requires_grad_(True).eval()
    ours, theirs = (peak_bytes(lambda model=model: _step(model, ids)) for model in (models.loramix, models.peft))
    layers = [layer for layer in models.loramix.modules() if isinstance(layer, XLoraLayer)]
    ranks = sum(layer.stack.rank for layer in layers)
    columns = ranks if models.size.layerwise else layers[0].stack.rank
    limit = (base + 4 * ids.numel() * (ranks + columns + models.size.hidden)) / base
    peaks: Samples = {"base": [float(base)], "loramix": [float(ours)], "PEFT": [float(theirs)]}
    return Measurement(work, peaks, limit, limit, unit="B")
