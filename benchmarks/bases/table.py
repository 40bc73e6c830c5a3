"""The page of base models, from what was found of each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.bases.checks import BASE_FAILS, CHECKS, LAYERS, NO_MODEL, REFUSED, WORKS, status

DOCS = Path(__file__).parents[2] / "docs"
JSON, PAGE = DOCS / "bases.json", DOCS / "bases.md"
_INTRODUCTION = """# Base models

What was tried on the classes of transformers {transformers}, with torch {torch}: tiny random models, and two experts on
every layer that can have some. To try again: `python -m benchmarks.bases` (all of them), or with the names of classes.
`loramix check BASE` answers for a model at hand, before there is an expert.

{checks}

Cells: **works**; **base fails**: the plain base model fails this check too, or cannot run it; **refused**: loramix
stops with an error, whose reason is in the last column; **fails**: another error. Layers that see other tokens than the
backbone, such as tables of positions and poolers, are refused by name and left out here. The parameters of
mixture-of-experts blocks are left out too: `tests/oracle/test_every_block.py` tries them on every class that has some.
"""
_TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "classification": "Sequence classification",
    "seq2seq": "Encoder–decoders",
    "speech": "Speech to text",
    "image": "Image classification",
    "image and text": "Images and text (the language model; text alone is given, and an image only where one must be)",
}


def page(found: dict[str, Any]) -> str:
    """docs/bases.md."""
    checks = "\n".join(f"- *{name}*: {what}" for name, what in CHECKS.items())
    parts = [_INTRODUCTION.format(checks=checks, **{name: found[name] for name in ("transformers", "torch")})]
    for mapping, rows in found["rows"].items():
        tried = {name: cells for name, cells in rows.items() if status(cells["build"]) != NO_MODEL}
        untried = sorted(set(rows) - set(tried))
        working = sum(
            all(status(cell) in (WORKS, BASE_FAILS, "") for check, cell in cells.items() if check != LAYERS)
            for cells in tried.values()
        )
        columns = [name for name in CHECKS if any(cells.get(name) for cells in tried.values())]
        parts.append(
            f"## {_TITLES[mapping]}\n\n{working} of {len(tried)} classes pass all that their base model passes.\n"
        )
        parts.append("\n".join(_lines(tried, columns)) + "\n")
        if untried:
            reasons = (f"- {name}: {rows[name]['build'].partition(': ')[2]}" for name in untried)
            parts.append("No tiny model was made of:\n\n" + "\n".join(reasons) + "\n")
    return "\n".join(parts)


def _lines(rows: dict[str, dict[str, str]], columns: list[str]) -> list[str]:
    lines = [f"| class | {' | '.join(columns)} | why not |", "|---" * (len(columns) + 2) + "|"]
    for name, cells in sorted(rows.items()):
        reasons = dict.fromkeys(cell.partition(": ")[2] for cell in cells.values() if ": " in cell)
        why = "; ".join(reasons).replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join(status(cells.get(column, '')) for column in columns)} | {why} |")
    return lines


def sample(found: dict[str, Any], seed: int, size: int) -> list[str]:
    """Classes that were tried, drawn with a seed."""
    tried = {
        name
        for rows in found["rows"].values()
        for name, cells in rows.items()
        if status(cells["build"]) not in (NO_MODEL, REFUSED)
    }
    return random.Random(seed).sample(sorted(tried), size)
