"""Measure: `python -m benchmarks.run forward decode generate growth --json docs/benchmarks.json`.

A work that is measured again replaces its own part of the file; other works stay if machine, versions and sizes do.
Then `python -m benchmarks.report docs/benchmarks.json` writes the page and the plots beside the JSON.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from benchmarks import (
    batch,
    compiled,
    decode,
    demo,
    experts,
    fixed,
    forward,
    generate,
    growth,
    length,
    load,
    lockstep,
    memory,
    mixtures,
    prefill,
    ranks,
    record,
    rejected,
    start,
    training,
)
from benchmarks.models import Models, build
from benchmarks.report import header, tables
from benchmarks.sizes import SIZES, Name
from loramix.timing import Measurement, describe_machine

PACKAGES = ("torch", "transformers", "peft", "loramix")
WORKS: dict[str, Callable[[Models, int], list[Measurement]]] = {
    "forward": forward.measure,
    "prefill": prefill.measure,
    "decode": decode.measure,
    "generate": generate.measure,
    "lockstep": lockstep.measure,
    "rejected": rejected.measure,
    "demo": demo.measure,
    "growth": growth.measure,
    "length": length.measure,
    "experts": experts.measure,
    "ranks": ranks.measure,
    "batch": batch.measure,
    "compiled": compiled.measure,
    "fixed": fixed.measure,
    "record": record.measure,
    "training": training.measure,
    "memory": memory.measure,
    "mixtures": mixtures.measure,
    "start": start.measure,
    "load": load.measure,
}
ROUNDS = {
    "forward": 61,
    "prefill": 7,
    "decode": 101,
    "generate": 17,
    "lockstep": 5,
    "rejected": 9,
    "demo": 9,
    "growth": 9,
    "length": 41,
    "experts": 25,
    "ranks": 15,
    "batch": 21,
    "compiled": 41,
    "fixed": 61,
    "record": 21,
    "training": 9,
    "memory": 1,
    "mixtures": 25,
    "start": 7,
    "load": 7,
}


def main(
    works: Annotated[list[str] | None, typer.Argument(help=f"Any of: {', '.join(WORKS)}; all if none.")] = None,
    size: Annotated[str, typer.Option(help=f"One of: {', '.join(get_args(Name))}.")] = "small",
    layerwise: Annotated[bool, typer.Option(help="Scalings for each adapted layer.")] = False,
    vocabulary: Annotated[int | None, typer.Option(help="Another vocabulary than the size's own.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of each work.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Time loramix, the base model and PEFT side by side, on one thread, in CPU time."""
    for work in works or ():
        if work not in WORKS:
            raise typer.BadParameter(f"{work!r} is none of {', '.join(WORKS)}")
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r} is none of {', '.join(SIZES)}", param_hint="--size")
    chosen = replace(SIZES[size], layerwise=layerwise)
    if vocabulary is not None:
        chosen = replace(chosen, vocabulary=vocabulary)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = build(chosen, Path(folder))
    result = preamble(models)
    if json_file is not None and json_file.exists():
        result["works"] = kept_works(json.loads(json_file.read_text(encoding="utf-8")), result)
    print(header(result), flush=True)
    for work in works or WORKS:
        measured = WORKS[work](models, rounds or ROUNDS[work])
        result["works"][work] = [asdict(m) for m in measured]
        print(f"\n{work}\n\n{tables(measured)}", flush=True)
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def preamble(models: Models) -> dict[str, Any]:
    """What is known before anything is measured."""
    return {
        "machine": describe_machine(PACKAGES),
        "size": asdict(models.size),
        "weights": asdict(models.weights),
        "difference": models.difference,
        "works": {},
    }


def kept_works(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What was measured earlier, in the same circumstances but for the load; nothing if they were others."""
    now = json.loads(json.dumps(now))  # as it will be read again: a tuple comes back as a list
    same = all(earlier[part] == now[part] for part in ("size", "weights")) and all(
        earlier["machine"][fact] == now["machine"][fact] for fact in now["machine"] if fact != "load"
    )
    return earlier["works"] if same else {}


if __name__ == "__main__":
    typer.run(main)
