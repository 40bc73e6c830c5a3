"""`loramix demo`: the tour with the models that ship with loramix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.terminal import MAX_SEED, print_json, stdout_kept_for_json


def demo(
    out: Annotated[Path, typer.Option(help="The folder for the trained mixture and the picture.")] = Path(
        "loramix-demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="The number of training steps of the router.")] = 80,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_SEED,
            help="The random seed of the router's first weights, its training text and the sampling.",
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as one JSON document.")] = False,
    files: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write the demo's models, its text and a run.yaml to this folder, and stop."
        ),
    ] = None,
) -> None:
    """Build a mixture of the experts that ship with loramix, train its router, compare and generate.

    It takes a minute or two and needs no network. Everything that it prints is measured in this run.
    The exit code is 1 if the mixture does not beat the base model, each expert and the uniform mixture.

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
