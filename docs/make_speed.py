"""Puts the measured ratios of docs/benchmarks.json into the README: `make docs`; a test holds the two together."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import Measurement, Spread

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- speed -->\n", "<!-- /speed -->\n"
WORKS = ("forward", "generate")
SECTION = """| CPU time, in units of the base model's | loramix | arithmetic limit | PEFT's X-LoRA |
|---|---|---|---|
{rows}

Llama, H {hidden}, {blocks} blocks, vocabulary {vocabulary}; {experts} experts of rank {rank} on all seven linear
layers; float32, {processor}, one thread; medians of interleaved rounds, quartiles in brackets. The limit counts
multiplications; where the tokens of a prompt take less time each than a generated one, `generate` can lie below it.
How, and more figures: [docs/benchmarks.md](docs/benchmarks.md).
"""


def section() -> str:
    """The README's figures."""
    result = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))
    measured = [Measurement(**found) for work in WORKS for found in result["works"][work]]
    rows = "\n".join(
        f"| {m.work} | {_ratio(m.ratio('loramix'))} | {m.limit:.2f} | {_ratio(m.ratio('PEFT'))} |" for m in measured
    )
    return SECTION.format(rows=rows, processor=result["machine"]["processor"], **result["size"])


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lower:.2f}–{spread.upper:.2f})"


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + section() + END + rest.partition(END)[2], encoding="utf-8")
