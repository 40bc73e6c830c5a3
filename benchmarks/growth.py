"""How the ratios of `generate` grow with the number of generated tokens."""

from __future__ import annotations

from benchmarks.generate import measure_length
from benchmarks.models import Models
from loramix.timing import Measurement


def measure(models: Models, rounds: int) -> list[Measurement]:
    """One measurement for each length."""
    return [measure_length(models, new, rounds) for new in models.size.lengths]
