"""Puts the measured ratios of docs/benchmarks.json into the README: `make docs`; a test holds the two together."""

from __future__ import annotations

import json
from pathlib import Path

from loramix.timing import Measurement, Spread

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- speed -->\n", "<!-- /speed -->\n"
WORKS = ("forward", "generate", "length", "fixed", "training")
SECTION = """| CPU time (or memory), in units of the base model's | loramix | arithmetic limit | PEFT's X-LoRA |
|---|---|---|---|
{rows}

Llama, H {hidden}, {blocks} blocks, vocabulary {vocabulary}; {experts} experts of rank {rank} on all seven linear
layers; float32, {processor}, one thread; medians of interleaved rounds, quartiles in brackets. The limit counts
multiplications of two passes for each token. `generate` lies below it: it reads several tokens at once where it can,
and a model of random weights, as this one, repeats itself, which is the best case; the demo's experts below are
trained.
How, and more figures: [docs/benchmarks.md](docs/benchmarks.md).

| lockstep, on the demo mixture | right guesses | forwards a token | time / two passes |
|---|---|---|---|
{drafts}

Two passes take two forwards a token. How much more several rows cost than one depends on the machine; `generate` takes
the cheapest way.
"""


def section() -> str:
    """The README's figures."""
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
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + section() + END + rest.partition(END)[2], encoding="utf-8")
