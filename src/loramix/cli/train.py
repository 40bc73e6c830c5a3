"""`loramix train`: train the router of a mixture, and new experts with it, from files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loramix.cli.options import as_changes, named_paths
from loramix.cli.terminal import print_json, stdout_kept_for_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.training.plan import Plan


def train(
    settings: Annotated[Path | None, typer.Argument(metavar="[SETTINGS]", help="The settings: a YAML file.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model: a folder or a Hub id.")] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An expert: a folder or a Hub id; repeat the option for each."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The training text: JSON lines, a folder of text files, or a data set on the Hub."),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="The evaluation text, in the same forms as --data.")] = None,
    output: Annotated[str | None, typer.Option(help="The folder for checkpoints and the trained mixture.")] = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="The start: labels, prompts, text, zeros, random; else chosen."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, for example trainer.max_steps=200."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings and the files, without loading weights, and stop.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, and remove earlier checkpoints.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan or the evaluation as one JSON document.")
    ] = False,
) -> None:
    """Train the router of a mixture, and new experts with it; then evaluate the mixture.

    [bold]Examples[/bold]

    loramix train run.yaml --dry-run

    loramix train run.yaml --set trainer.max_steps=200 --set objectives.supervised=0.1

    loramix train --base ./base --set experts.new=8 --set experts.r=8 --data train.jsonl --output run

    loramix train --base ./base --expert math=./math --expert code=./code --data train.jsonl --output run
    """
    changes: dict[str, Any] = {"base": base, "data.train": data, "data.eval": eval_data, "output": output}
    changes["init.method"] = init
    changes = {key: value for key, value in changes.items() if value is not None}
    if expert:
        changes["experts"] = named_paths(expert)
    changes |= as_changes(change or [])

    from loramix.training.check import check
    from loramix.training.run import run_training
    from loramix.training.settings import TrainSettings

    with stdout_kept_for_json(as_json), warnings_as_lines():
        chosen = TrainSettings.read(settings, changes)
        if dry_run:
            plan, done = check(chosen).plan, None
        else:
            plan, done = None, run_training(chosen, resume=not fresh, tell=_tell)
    if int(os.environ.get("RANK", "0")):
        return  # of several processes, only the first one prints
    if plan is not None:
        print_json(plan.to_dict()) if as_json else _show(plan)
    if done is not None:
        if as_json:
            found = None if done.evaluation is None else done.evaluation.to_dict()
            told = {} if done.dead is None else {"dead_experts": list(done.dead)}
            print_json({"mixture": str(done.folder), "evaluation": found, **told})
            return
        if done.evaluation is not None:
            from loramix.cli.evaluation import show

            show(done.evaluation, "bits_per_byte")
        print(done.folder)


def _tell(line: str) -> None:
    if not int(os.environ.get("RANK", "0")):
        print(line, file=sys.stderr)


def _show(plan: Plan) -> None:
    console = Console(highlight=False)
    facts = {
        "experts (E)": ", ".join(plan.experts),
        **({"new experts": ", ".join(plan.new_experts)} if plan.new_experts else {}),
        "adapted layers (L)": str(plan.layers),
        "base model": f"{plan.base_parameters:,} parameters",
        "router": f"{plan.router_parameters:,} parameters",
        "training rows": f"{plan.rows:,}, {plan.labelled:,} of them with an expert",
        "evaluation rows": f"{plan.eval_rows:,}",
        "router's start": plan.start,
        "optimizer steps": "by epochs of packed data" if plan.steps is None else f"{plan.steps:,}",
        "scaling pass cache": _size(plan.cache_bytes),
    }
    for name, value in facts.items():
        console.print(f"  {name + ':':24}{value}", markup=False)
    table = Table("memory", "bytes")
    for name, size in plan.memory.items():
        table.add_row(name, _size(size))
    table.add_section()
    table.add_row("total", _size(sum(plan.memory.values())))
    console.print(table)
    console.print("Everything is in place; no weights were loaded.")


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
