"""`loramix info`: the description of an expert or a mixture."""

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
    path: Annotated[str, typer.Argument(metavar="PATH", help="The expert or mixture: a folder, a Hub id, or `demo`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Describe an expert or a mixture, without loading its base model.

    Shows the base model, the number of experts (E) and of adapted layers (L), the size of the router,
    and each expert's rank, targets and parameters.

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
    kept = "all experts" if router.top_k is None else f"the best {router.top_k}"
    scope = "for each layer" if router.layerwise else "for all layers at once"
    settings = "".join(f", {name.replace('_', ' ')} {value}" for name, value in router.settings.items())
    return f"{router.kind}, {router.parameters:,} parameters{settings}; {kept}, {scope}"
