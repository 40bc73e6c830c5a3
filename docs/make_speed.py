"""Puts the measured ratios of docs/benchmarks.json into docs/speed.md: `make docs`; a test compares the two."""

from __future__ import annotations

import json
from pathlib import Path

from loramix.timing import Measurement, Spread

DOCS = Path(__file__).parent
PAGE = DOCS / "speed.md"
BEGIN, END = "<!-- speed -->\n", "<!-- /speed -->\n"
WORKS = ("forward", "generate", "length", "fixed", "training")
SECTION = """| CPU time (or memory), in units of the base model's | loramix | arithmetic limit | PEFT's X-LoRA |
|---|---|---|---|
{rows}

Llama, H {hidden}, {blocks} blocks, vocabulary {vocabulary}; {experts} experts of rank {rank} on all seven linear
layers; float32, {processor}, one thread; medians of interleaved rounds, quartiles in brackets. The limit counts the
multiplications of two passes for each token. `generate` lies below it, because one forward reads several tokens where
drafts are accepted. This model has random weights and repeats itself, which is the best case for drafts; the experts of
the demo mixture, below, are trained.

| lockstep, on the demo mixture | accepted drafts | forwards per token | time / sequential |
|---|---|---|---|
{drafts}

Sequential decoding takes two forwards per token. How much more a forward of several rows costs than one of a single row
depends on the machine.
"""


def section() -> str:
    """The figures of the page."""
    result = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))
    measured = [(work, Measurement(**found)) for work in WORKS for found in result["works"][work]]
    rows = "\n".join(
        f"| {m.work} | {_ratio(m.ratio('loramix'))} | {m.limit:.2f} | {'' if work == 'fixed' else _peft(m)} |"
        for work, m in measured  # PEFT cannot fix its routing
        if m.limit is not None
    )
    drafts = "\n".join(
        f"| {m.work} | {m.facts['accepted']:.0%} | {m.facts['forwards per token']:.2f} | "
        f"{_ratio(m.ratio('loramix', to='two passes'))} |"
        for m in (Measurement(**found) for found in result["works"]["demo"])
    )
    return SECTION.format(rows=rows, drafts=drafts, processor=result["machine"]["processor"], **result["size"])


def _peft(measured: Measurement) -> str:
    return _ratio(measured.ratio("PEFT")) if "PEFT" in measured.samples else ""


def _ratio(spread: Spread) -> str:
    if spread.rounds == 1:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.lower:.2f}–{spread.upper:.2f})"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + section() + END + rest.partition(END)[2], encoding="utf-8")
