"""Interleaved timing in CPU time, and ratios taken in pairs.

A machine that others use slows down and speeds up while a benchmark runs. So each round runs every contender once, the
next round starts with another one, and a ratio is taken within a round before the median over rounds is.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Times = dict[str, list[float | None]]


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Args:
        name: in tables.
        call: what is timed.
        every: it takes part in one round of so many; slow ones need fewer rounds.
    """

    name: str
    call: Callable[[], object]
    every: int = 1


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, over `rounds` rounds."""

    median: float
    lower: float
    upper: float
    rounds: int


@dataclass(frozen=True)
class Measurement:
    """One comparison: the CPU seconds of each contender in each round (None: it sat the round out).

    Args:
        work: what was done.
        seconds: by contender.
        limit: the arithmetic limit of loramix's ratio to the base model.
        target: the ratio to reach.
        facts: whatever else belongs in the table.
    """

    work: str
    seconds: Times
    limit: float | None = None
    target: float | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def time(self, name: str) -> Spread:
        """CPU seconds of one contender."""
        return spread([t for t in self.seconds[name] if t is not None])

    def ratio(self, name: str, to: str = "base") -> Spread:
        """CPU time of one contender over another's, round by round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return spread([a / b for a, b in pairs if a is not None and b is not None])


def interleave(contenders: Sequence[Contender], rounds: int, *, warm_ups: int = 1) -> Times:
    """CPU seconds of every contender in every round; the order turns from round to round."""
    for contender in [c for c in contenders for _ in range(warm_ups)]:
        contender.call()
    times: Times = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                due = turn % contender.every == 0
                times[contender.name].append(_cpu_seconds(contender.call) if due else None)
    finally:
        gc.enable()
    return times


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return round(time.process_time() - start, 6)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper, len(values))
