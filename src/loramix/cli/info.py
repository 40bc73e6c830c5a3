"""`loramix info`: what a folder is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loramix.cli.shipped import is_shipped
from loramix.cli.terminal import print_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.formats import Description, RouterDescription


def info(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="An expert or a mixture, folder or Hub id; `demo` ships.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Say what a folder is, without loading its base model.

    An expert or a mixture, and of which base model; the experts' names, ranks and targets; the number of adapted
    layers (L) and of experts (E); the parameters of the router.

    [bold]Examples[/bold]

    loramix info ./mixture

    loramix info ./mixture/math --json
    """
    from loramix import demo
    from loramix.formats import describe

    with warnings_as_lines():
        description = describe(demo.mixture() if is_shipped(path) else path)
    if as_json:
        print_json(description.to_dict())
    else:
        _show(description)


def _show(description: Description) -> None:
    console = Console(highlight=False)
    facts = {
        "base model": description.base_model or "not named",
        "task": description.task_type or "not named",
        "experts (E)": str(description.num_experts),
        "adapted layers (L)": str(description.num_layers),
        "router": _router(description.router),
    }
    console.print(Text.assemble((description.kind.value, "bold"), " ", description.path))
    for name, value in facts.items():
        if value:
            console.print(f"  {name + ':':20}", Text(value))
    console.print(_experts(description))


def _experts(description: Description) -> Table:
    table = Table("expert", "rank", "alpha", "targets", "modules", "parameters", "dtype")
    for expert in description.experts:
        table.add_row(
            Text(expert.name),
            ", ".join(map(str, expert.ranks)),
            f"{expert.alpha:g}" + "".join(f" {variant}" for variant in expert.variants),
            ", ".join(expert.targets),
            str(expert.modules),
            f"{expert.parameters:,}",
            ", ".join(expert.dtypes),
        )
    return table


def _router(router: RouterDescription | None) -> str:
    if router is None:
        return ""
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in router.settings.items() if name != "layerwise"]
    kept = "all experts" if router.top_k is None else f"the best {router.top_k}"
    scope = "for each layer" if router.settings.get("layerwise", True) else "for all layers at once"
    return f"{', '.join([router.kind, f'{router.parameters:,} parameters', *facts])}; {kept}, {scope}"
