"""The list of commands, the version option, and errors shown as text with exit code 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from loramix import __version__
from loramix.cli import (
    bench,
    check,
    convert,
    demo,
    distil,
    doctor,
    edit,
    evaluation,
    generate,
    info,
    inspect,
    train,
    train_expert,
)
from loramix.cli.terminal import ends_where_stdout_ends, show_error, write_what_stdout_can
from loramix.errors import LoramixError

COMMANDS = {
    "demo": demo.demo,
    "train": train.train,
    "train-expert": train_expert.train_expert,
    "distil": distil.distil,
    "eval": evaluation.evaluate,
    "generate": generate.generate,
    "info": info.info,
    "inspect": inspect.inspect,
    "convert": convert.convert,
    "edit": edit.edit,
    "check": check.check,
    "bench": bench.bench,
    "doctor": doctor.doctor,
}


def _print_version(requested: bool) -> bool:
    if requested:
        typer.echo(f"loramix {__version__}")
        raise typer.Exit
    return requested


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Mixtures of LoRA experts (X-LoRA) for Hugging Face models."""


def build_app() -> typer.Typer:
    """The typer application, made from `COMMANDS`."""
    app = typer.Typer(
        name="loramix", callback=_root, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    for name, command in COMMANDS.items():
        app.command(name)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process.

    Args:
        arguments: the words after `loramix`; those of the process when None.

    Raises:
        SystemExit: always. 0: success; 1: one of loramix's own errors, printed to stderr, or stdout could not be
            written completely; 2: wrong usage.
    """
    write_what_stdout_can()
    with ends_where_stdout_ends():
        try:
            build_app()(arguments, prog_name="loramix")
        except LoramixError as error:
            show_error(error)
            raise SystemExit(1) from None
