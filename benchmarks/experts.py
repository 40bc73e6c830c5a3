"""How a forward and a decoded token grow with the number of experts."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import decode, forward
from benchmarks.models import Models, build
from benchmarks.sizes import SIZES
from loramix.timing import Measurement

COUNTS = (4, 16, 64)
FORWARD_RANK, DECODE_RANK = 16, 8


def measure(models: Models, rounds: int) -> list[Measurement]:
    """A forward over the prompt and one token after it, for each number of experts, on the wide size."""
    found: list[Measurement] = []
    small = models.size.hidden < 512
    size = models.size if small else SIZES["wide"]
    for count in (2,) if small else COUNTS:
        for rank, work in ((FORWARD_RANK, forward), (DECODE_RANK, decode)):
            with tempfile.TemporaryDirectory() as folder:
                chosen = build(replace(size, experts=count, rank=rank), Path(folder))
            turns = max(2, rounds // 4) if work is forward and count > COUNTS[0] else rounds
            measured = work.measure(chosen, turns)[0]
            facts = {**measured.facts, "experts": count, "rank": rank}
            found.append(replace(measured, work=f"{measured.work}, E {count}, r {rank}", facts=facts))
    return found
