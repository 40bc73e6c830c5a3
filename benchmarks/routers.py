"""What each kind of router gives, and how far that is on the way to the causal ceiling: `python -m benchmarks.routers`.

Three mixtures (`benchmarks.routers_mixtures`); bits per byte of held-out text, lower is better. A row's share is

    (uniform − row) / (uniform − ceiling)

Writes docs/routers.json, from which `make docs` makes the tables of docs/routers.md. A mixture that is measured alone
takes its place among the others there.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from benchmarks.routers_mixtures import TRAIN, Case, demo, installed, together, train
from loramix import XLoraModel
from loramix.evaluation import causal_ceiling
from loramix.evaluation.passages import Passage, pad
from loramix.evaluation.scores import measure, total
from loramix.timing import describe_machine
from loramix.training import distil_router, init_router

DOCS = Path(__file__).parent.parent / "docs"
WINDOWS = (4, 16, TRAIN)
"""Labelled windows an expert."""

LABELLED, UNLABELLED = 16, 30
"""Windows an expert: labelled ones of most rows, and the ones after them for a distillation."""

KEPT, STEPS, BATCH, RATE = 8, 24, 6, 1e-3
USUAL_STEPS, USUAL_RATE, DISTILLED_STEPS = 100, 2e-3, 60
CHANGE = 0.01
"""Of the ceiling on text that switches domain; 0 on the other."""

Figures = dict[str, float]
Row = tuple[str, str, Figures]
"""A router, the text that it was made from, and its figures."""


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


def untaught(case: Case) -> Iterator[Row]:
    """Routers that are made without labels and without a teacher."""
    yield "arrow", "none", figures(case.mixture("arrow"), case)
    yield "norm, not calibrated", "none", figures(case.mixture("norm"), case)
    norm = case.mixture("norm")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        init_router(norm, "text", batches=unlabelled(case))
    told = any("no better than the uniform mixture" in str(each.message) for each in caught)
    yield (
        f"norm, calibrated ({'warns' if told else 'does not warn'})",
        _windows_of("without labels"),
        figures(norm, case),
    )


def started(case: Case, kind: str, counts: Sequence[int] = WINDOWS) -> Iterator[Row]:
    """A kind of router from so many labelled windows, in closed form."""
    for count in counts:
        model = case.mixture(kind)
        init_router(model, "labels", batches=labelled(case, count))
        yield kind, _windows_of("with labels", count), figures(model, case)


def guessed(case: Case, kind: str) -> Row:
    """A kind of router from text whose labels are the experts' own, by likelihood."""
    model = case.mixture(kind)
    init_router(model, "text", batches=unlabelled(case))
    return kind, _windows_of("without labels"), figures(model, case)


def distilled(case: Case, kind: str) -> Row:
    """A kind of router that learned from one of prototypes, on text without labels."""
    model = case.mixture("prototypes")
    init_router(model, "labels", batches=labelled(case, LABELLED))
    texts = _windows(case, UNLABELLED, LABELLED)
    random.Random(0).shuffle(texts)
    made = [pad(texts[i : i + 4]) for i in range(0, len(texts), 4)]
    batches = [{"input_ids": ids, "attention_mask": real} for ids, real in made]
    found = distil_router(model, kind, batches, steps=DISTILLED_STEPS)
    print(case.name, kind, found.to_dict(), flush=True)
    text = f"prototypes of {LABELLED} windows, and {UNLABELLED} without labels"
    return f"{kind}, distilled", text, figures(model, case)


def usual(case: Case) -> Row:
    """X-LoRA's classifier as it is trained today: from a random start, on the language-model loss."""
    model = case.mixture("classifier", xlora_depth=1)
    train(model, _windows(case, _last(case)), rate=USUAL_RATE, steps=USUAL_STEPS, batch=BATCH, warmup=4)
    return f"classifier, random start, {USUAL_STEPS} steps", "the training text", figures(model.eval(), case)


def unlabelled(case: Case) -> list[dict[str, torch.Tensor]]:
    """The same windows as `labelled`, without labels."""
    return [{"input_ids": batch["input_ids"]} for batch in labelled(case, LABELLED)]


def _windows_of(kind: str, count: int = LABELLED) -> str:
    return f"{count} windows an expert, {kind}"


def trained(case: Case, kind: str) -> Row:
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
    return f"{kind}, trained", "all labelled windows", figures(model, case)


def _last(case: Case) -> int:
    """The first of the windows of each expert that are kept to choose by."""
    return min(len(rows) for rows in case.train.values()) - KEPT


def _windows(case: Case, count: int, first: int = 0) -> list[list[int]]:
    return [ids for rows in case.train.values() for ids in rows[first : first + count]]


def measured(case: Case) -> dict[str, Any]:
    """All rows of a mixture, each with its share of the way from uniform to the ceiling."""
    rows = [(name, "", row) for name, row in bounds(case)]
    rows += untaught(case)
    rows += started(case, "prototypes")
    rows += started(case, "linear", (LABELLED,))
    rows += started(case, "evidence")
    rows += [guessed(case, kind) for kind in ("prototypes", "evidence")]
    if case.trains:
        rows += [usual(case)]
        rows += [trained(case, kind) for kind in ("prototypes", "linear", "evidence")]
        rows += [distilled(case, kind) for kind in ("linear", "evidence")]
    by_name = {name: row for name, _, row in rows}
    low, high = by_name["uniform"], by_name["ceiling"]
    found = list[dict[str, Any]]()
    for name, text, row in rows:
        share = {column: (low[column] - value) / (low[column] - high[column]) for column, value in row.items()}
        found.append({"router": name, "text": text, "bits_per_byte": row, "share": share})
        print(f"{case.name:10} {name:40} {text:50}", *(f"{c} {row[c]:.4f} {100 * share[c]:4.0f} %" for c in row))
    return {"experts": list(case.experts), "rows": found}


def main() -> None:
    """Measure all of it."""
    cases = {"demo": demo, "installed": installed, "together": together}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=Path, help="where the second mixture's experts are kept; made if absent")
    parser.add_argument("--mixtures", nargs="+", choices=cases, default=list(cases), help="those to measure")
    given = parser.parse_args()
    folder = given.experts or Path(tempfile.mkdtemp())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = DOCS / "routers.json"
    known = json.loads(place.read_text(encoding="utf-8"))["mixtures"] if place.is_file() else {}
    for name in given.mixtures:
        known[name] = measured(cases[name](folder)) | {"machine": describe_machine()}
    ordered = {name: known[name] for name in cases if name in known}
    place.write_text(json.dumps({"mixtures": ordered}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
