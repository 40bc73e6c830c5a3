"""What each kind of router gives, and how far that is on the way to the causal ceiling: `python -m benchmarks.routers`.

Two mixtures (`benchmarks.routers_mixtures`); bits per byte of held-out text, lower is better. A row's share is

    (uniform − row) / (uniform − ceiling)

Writes docs/routers.json. A kind of router is measured from each start that it has: add it to `KINDS`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from benchmarks.routers_mixtures import TRAIN, Case, demo, installed, train
from loramix import XLoraModel
from loramix.errors import LoramixError
from loramix.evaluation import causal_ceiling
from loramix.evaluation.passages import Passage
from loramix.evaluation.scores import measure, total
from loramix.timing import describe_machine
from loramix.training import init_router

DOCS = Path(__file__).parent.parent / "docs"
KINDS = ("static", "prototypes", "classifier")
"""The kinds of router that are measured."""

WINDOWS = (4, 16, TRAIN)
"""Labelled windows an expert."""

KEPT, STEPS, BATCH, RATE = 8, 24, 6, 2e-3
CHANGE = 0.01
"""Of the ceiling on text that switches domain; 0 on the other."""

Figures = dict[str, float]


def figures(model: XLoraModel, case: Case) -> Figures:
    """Bits per byte of all held-out text together, and of the text that switches."""
    mixed = [passage for found in case.heldout.values() for passage in found]
    columns = {"mixed": mixed, "switching": case.switching}
    return {name: bits_per_byte(model, passages) for name, passages in columns.items()}


def bits_per_byte(model: XLoraModel, passages: Sequence[Passage]) -> float:
    """Of all these passages together."""
    return total(measure(model, passages).values()).bits_per_byte


def bounds(case: Case) -> Iterator[tuple[str, Figures]]:
    """The rows that need no router."""
    model = case.mixture("static")
    with model.disable_adapter():
        yield "base", figures(model, case)
    yield "uniform", figures(model, case)
    alone: dict[str, Figures] = {}
    oracle: dict[str, list[Any]] = {"mixed": [], "switching": []}
    mixed = [passage for found in case.heldout.values() for passage in found]
    for chosen in model.expert_names:
        with model.fixed_scalings([float(chosen == name) for name in model.expert_names]):
            scores = {"mixed": measure(model, mixed), "switching": measure(model, case.switching)}
        alone[chosen] = {column: total(found.values()).bits_per_byte for column, found in scores.items()}
        for column, found in scores.items():
            oracle[column].append(found)
    yield "best single expert", min(alone.values(), key=lambda row: row["mixed"])
    best = {
        column: total(min((one[group] for one in found), key=lambda score: score.nats) for group in found[0])
        for column, found in oracle.items()
    }
    yield "oracle", {column: score.bits_per_byte for column, score in best.items()}
    found = {
        "mixed": causal_ceiling(model, mixed),
        "switching": causal_ceiling(model, case.switching, change=CHANGE),
    }
    yield "ceiling", {c: total(one.scalings.values()).bits_per_byte for c, one in found.items()}
    yield "ceiling, probabilities", {c: total(one.probabilities.values()).bits_per_byte for c, one in found.items()}


def labelled(case: Case, count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """Windows of each expert, as batches for `init_router`."""
    return [
        {"input_ids": torch.tensor([ids]), "expert_ids": torch.tensor([number])}
        for number, rows in enumerate(case.train.values())
        for ids in rows[first : first + count]
    ]


def starts(case: Case, kind: str) -> Iterator[tuple[str, Figures]]:
    """A kind of router from each number of labelled windows, from text without labels, and trained."""
    for count in WINDOWS:
        model = case.mixture(kind)
        try:
            init_router(model, "labels", batches=labelled(case, count))
        except LoramixError as error:
            print(f"{kind}: {error}", flush=True)
            return
        yield f"{kind}, {count} windows", figures(model, case)
    model = case.mixture(kind)
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in labelled(case, 16)]
    init_router(model, "text", batches=unlabelled)
    yield f"{kind}, 16 windows without labels", figures(model, case)
    yield f"{kind}, trained", figures(trained(case, kind), case)


def trained(case: Case, kind: str) -> XLoraModel:
    """Started from all windows but the last ones, trained on the same, and kept where it is better on the last ones."""
    model = case.mixture(kind)
    least = _last(case)
    init_router(model, "labels", batches=labelled(case, least))
    last = [Passage(ids, ["all"] * (len(ids) - 1), [1] * (len(ids) - 1)) for ids in _windows(case, KEPT, least)]
    before = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    start = bits_per_byte(model, last)
    train(model, _windows(case, least), rate=RATE, steps=STEPS, batch=BATCH, warmup=4)
    model.eval()
    after = bits_per_byte(model, last)
    print(f"{kind}: {start:.4f} before training, {after:.4f} after, on text to choose by", flush=True)
    if after >= start:
        model.router.load_state_dict(before)
    return model


def _last(case: Case) -> int:
    """The first of the windows of each expert that are kept to choose by."""
    return min(len(rows) for rows in case.train.values()) - KEPT


def _windows(case: Case, count: int, first: int = 0) -> list[list[int]]:
    return [ids for rows in case.train.values() for ids in rows[first : first + count]]


def measured(case: Case) -> dict[str, dict[str, Figures]]:
    """All rows of a mixture, each with its share of the way from uniform to the ceiling."""
    rows: dict[str, Figures] = {}
    found: dict[str, dict[str, Figures]] = {}
    for name, row in (*bounds(case), *(pair for kind in KINDS for pair in starts(case, kind))):
        rows[name] = row
    low, high = rows["uniform"], rows["ceiling"]
    for name, row in rows.items():
        share = {column: (low[column] - value) / (low[column] - high[column]) for column, value in row.items()}
        found[name] = {"bits_per_byte": row, "share": share}
        print(f"{case.name:10} {name:40}", *(f"{c} {row[c]:.4f} {100 * share[c]:4.0f} %" for c in row), flush=True)
    return found


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=Path, help="where the second mixture's experts are kept; made if absent")
    folder = parser.parse_args().experts or Path(tempfile.mkdtemp())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = {
        "machine": describe_machine(),
        "mixtures": {case.name: measured(case) for case in (demo(), installed(folder))},
    }
    (DOCS / "routers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
