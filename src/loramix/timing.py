"""Timing in interleaved rounds; ratios taken in pairs, and the peak of what a call allocates.

A machine that others use slows down and speeds up while a benchmark runs. So each round runs every contender once, the
next round starts with another one, and a ratio is taken within a round before the median over rounds is.
"""

from __future__ import annotations

import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Samples = dict[str, list[float | None]]


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Args:
        name: in tables.
        call: what is timed.
        every: it takes part in one round of so many, and warms up once; slow ones need fewer rounds.
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
    """One comparison: a sample of each contender in each round (None: it sat the round out).

    Args:
        work: what was done.
        samples: by contender.
        limit: the arithmetic limit of loramix's ratio to the base model.
        target: the ratio to reach.
        facts: whatever else belongs in the table.
        unit: of the samples, "s" (CPU seconds) or "B" (bytes).
    """

    work: str
    samples: Samples
    limit: float | None = None
    target: float | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    unit: str = "s"

    def amount(self, name: str) -> Spread:
        """CPU seconds, or bytes, of one contender."""
        return spread([t for t in self.samples[name] if t is not None])

    def ratio(self, name: str, to: str = "base") -> Spread:
        """One contender over another, round by round."""
        pairs = zip(self.samples[name], self.samples[to], strict=True)
        return spread([a / b for a, b in pairs if a is not None and b is not None])


def interleave(
    contenders: Sequence[Contender], rounds: int, *, warm_ups: int = 1, clock: Callable[[], float] = time.process_time
) -> Samples:
    """CPU seconds of every contender in every round, by `clock`; the order turns from round to round."""
    for contender in [c for c in contenders for _ in range(warm_ups if c.every == 1 else min(warm_ups, 1))]:
        contender.call()
    times: Samples = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                due = turn % contender.every == 0
                times[contender.name].append(_seconds(contender.call, clock) if due else None)
    finally:
        gc.enable()
    return times


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return round(clock() - start, 6)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call holds at once, beyond what was there before; exact, from the allocator's own events.

    Memory that a library takes by itself, past PyTorch's allocator, is not seen.
    """
    call()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper, len(values))


def describe_machine(packages: Sequence[str] = ("torch", "transformers", "loramix")) -> dict[str, Any]:
    """Where a figure was taken: the processor, its threads, and the versions of some packages."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of the CPU; on another device those of the wall, once it has done what it was given."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock


def generation_times(model: Any, ids: torch.Tensor, tokens: int, rounds: int) -> Measurement:
    """Greedy generation, interleaved: the base model, two passes, as `generate` decides, and with fixed routing.

    Args:
        model: a mixture.
        ids: (1, S), the prompt.
        tokens: to generate.
        rounds: of each way.
    """
    experts = len(model.expert_names)

    def generate(**how: Any) -> None:
        mask = torch.ones_like(ids)
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **how
        )

    def base() -> None:
        with model.disable_adapter():
            generate()

    def fixed() -> None:
        with model.fixed_scalings([1 / experts] * experts):
            generate()

    reports: list[Any] = []

    def chosen() -> None:
        generate()
        reports.append(model.lockstep_report)

    contenders = [
        Contender("base model", base),
        Contender("two passes", lambda: generate(lockstep=False)),
        Contender("generate", chosen),
        Contender("fixed routing", fixed),
    ]
    times = interleave(contenders, rounds, warm_ups=2, clock=clock_of(ids.device))
    report = reports[-1]
    facts = {
        "tokens": tokens,
        "clock": "CPU time" if ids.device.type == "cpu" else f"time, {ids.device.type} included",
        "forwards per token": report.forwards_per_token,
        "accepted": report.accepted if report.drafts else None,
    }
    return Measurement(f"{tokens} tokens after {ids.shape[1]}", times, facts=facts)
