"""`loramix check`: what loramix can do with a base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loramix.cli.shipped import is_shipped
from loramix.cli.terminal import print_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.model.compatibility import Compatibility


def check(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder, a Hub id, or `demo`.")],
    targets: Annotated[
        str, typer.Option(help="target_modules of the experts: names with commas between, or all-linear.")
    ] = "all-linear",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Check whether a base model can carry a mixture, and with which target modules.

    Reads the model's configuration only, not its weights. A forward is run on a copy of its structure
    to see which tokens each layer gets. The exit code is 1 if some of the targets do not work.

    [bold]Examples[/bold]

    loramix check ./base

    loramix check ./base --targets q_proj,v_proj
    """
    from loramix import demo
    from loramix.files.base_models import load_config, without_weights
    from loramix.model.compatibility import check_base

    with warnings_as_lines():
        model = demo.base() if is_shipped(base) else without_weights(load_config(base, revision))
        names = [name.strip() for name in targets.split(",") if name.strip()]
        found = check_base(model, targets if len(names) < 2 and targets == "all-linear" else names)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    raise typer.Exit(0 if found.works else 1)


def _show(found: Compatibility) -> None:
    console = Console(highlight=False)
    console.print(Text.assemble((found.model, "bold")))
    if found.problem is not None:
        console.print(f"  cannot carry a mixture with these targets: {found.problem}", markup=False)
        return
    console.print(f"  the passes run in {found.backbone}, hidden size {found.hidden_size}", markup=False)
    table = Table("layers", "number", "any router", "static router")
    for group in found.targets:
        routed = "works" if group.problem is None else group.problem
        table.add_row(Text(group.name), str(group.layers), Text(routed), "works" if group.works_with_static else "no")
    console.print(table)
    if not found.dry_run:
        console.print("  A dry run was not possible: whether these layers see the texts' tokens shows in a forward.")
    elif not found.works:
        console.print(f"  These work: target_modules={found.working_targets}", markup=False)
