"""`loramix convert`: a saved mixture in another format."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loramix.cli.options import named_paths
from loramix.cli.shipped import is_shipped
from loramix.cli.terminal import print_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.model.convert import Conversion


class Target(str, Enum):  # noqa: UP042 - typer shows its values
    """The formats that a mixture is written in."""

    PEFT = "peft"
    ORIGINAL = "original"
    LORAMIX = "loramix"


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="The mixture: a folder, a Hub id, or `demo`.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    to: Annotated[Target, typer.Option(help="The format of the new folder.")],
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="An expert to use instead of the saved one, or one that the mixture does not name; repeat the option "
            "for each.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, whose configuration is read for the ordering file of mistral.rs. Default: the one "
            "that the mixture names."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Rewrite a mixture for PEFT, for the original X-LoRA library, or for loramix.

    Reads every format of mixtures that loramix knows. No weights of a base model are loaded.
    The report says what the new format does not hold. With `--to original`, the ordering file that mistral.rs
    needs is written too.

    [bold]Examples[/bold]

    loramix convert ./mixture ./for-peft --to peft

    loramix convert user/x-lora ./mixture --to loramix --expert math=./math --expert code=./code
    """
    from loramix import demo
    from loramix.model.convert import convert as run

    adapters = named_paths(expert or []) or None
    with warnings_as_lines():
        done = run(demo.mixture() if is_shipped(source) else source, output, to.value, adapters=adapters, base=base)
    if as_json:
        print_json(done.to_dict())
    else:
        _show(done)


def _show(done: Conversion) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{done.source} ({done.source_format}) -> {done.folder} ({done.format})", markup=False)
    names = ", ".join(old if old == new else f"{old} as {new}" for old, new in done.experts.items())
    console.print(f"  the router, for {done.num_layers} layers; experts {names}", markup=False)
    if done.ordering:
        console.print("  the ordering file of mistral.rs", markup=False)
    for note in done.notes:
        console.print(f"  note: {note}", markup=False)
