"""`loramix edit`: a saved mixture with other experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loramix.cli.options import named_paths
from loramix.cli.shipped import is_shipped
from loramix.cli.terminal import print_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.model.edit import Edit


def edit(
    source: Annotated[str, typer.Argument(metavar="IN", help="The mixture: a folder, a Hub id, or `demo`.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An expert to remove; repeat the option for each.")
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="The one that takes an expert's place, with the router as it is; likewise."
        ),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Another name for an expert; likewise.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A new expert, last in order. It changes no output until the router is trained; likewise.",
        ),
    ] = None,
    order: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="The names of all experts in the order that they are to have.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Remove, replace, rename, add and reorder the experts of a mixture.

    The edits are made in this order, whatever the order of the options. The other experts keep their logits, bit by
    bit. No base model is loaded.

    [bold]Examples[/bold]

    loramix edit ./mixture ./smaller --remove poems --rename math=algebra

    loramix edit ./mixture ./larger --add physics=user/physics-lora --order physics,math,code
    """
    from loramix import demo
    from loramix.model.edit import edit as run

    with warnings_as_lines():
        done = run(
            demo.mixture() if is_shipped(source) else source,
            output,
            remove=remove or [],
            replace=named_paths(replace or [], "--replace"),
            rename=named_paths(rename or [], "--rename", "OLD=NEW"),
            add=named_paths(add or [], "--add"),
            order=[name.strip() for name in order.split(",")] if order else [],
        )
    if as_json:
        print_json(done.to_dict())
    else:
        _show(done)


def _show(done: Edit) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{done.source} -> {done.folder}", markup=False)
    console.print(f"  experts {', '.join(done.before)} -> {', '.join(done.experts)}", markup=False)
    for note in done.notes:
        console.print(f"  note: {note}", markup=False)
