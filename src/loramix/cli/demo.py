"""`loramix demo`: the tour."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.terminal import MAX_SEED, print_json, stdout_kept_for_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the trained mixture and the picture.")] = Path("loramix-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of router training.")] = 80,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="Of the router's first weights, its training text and what is written."),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as one JSON document.")] = False,
    files: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Instead of the tour, write its models, text and a run.yaml there."),
    ] = None,
) -> None:
    """Mix the experts that ship with loramix, train their router, compare, and write: a minute or two, no network.

    Everything that it prints is measured in this run. Exit code 1 if the router does not earn its place.

    [bold]Examples[/bold]

    loramix demo

    loramix demo --out tour --json > measured.json

    loramix demo --files work
    """
    if files is not None:
        from loramix.demo.files import write_files

        print(f"{files}: {', '.join(write_files(files))}")
        return

    from loramix.demo import DemoSettings, run_demo

    with stdout_kept_for_json(as_json):
        result = run_demo(out, DemoSettings(steps=steps, seed=seed))
    if as_json:
        print_json(result.to_dict())
    if not result.succeeded:
        raise typer.Exit(1)
