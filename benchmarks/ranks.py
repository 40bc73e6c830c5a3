"""How a forward and a decoded token grow with the rank of the experts, their number fixed."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import decode, forward
from benchmarks.models import Models, build
from loramix.timing import Measurement

RANKS = (4, 8, 16, 32, 64)


def measure(models: Models, rounds: int) -> list[Measurement]:
    """A forward over the prompt and one token after it, for each rank."""
    found: list[Measurement] = []
    for rank in RANKS if models.size.hidden >= 512 else (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            chosen = build(replace(models.size, rank=rank), Path(folder))
        for work in (forward, decode):
            measured = work.measure(chosen, rounds)[0]
            total = rank * models.size.experts
            name = f"{measured.work}, R {total} ({models.size.experts} × {rank})"
            found.append(replace(measured, work=name, target=None, facts={"rank": rank, "ranks": total}))
    return found
