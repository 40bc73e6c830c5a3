"""`loramix inspect`: the routing of a text, in the terminal, as JSON, or as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli.terminal import print_json, read_text, stdout_kept_for_json, warnings_as_lines


def inspect(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="The mixture: a folder, a Hub id, or `demo`.")],
    text: Annotated[str | None, typer.Option(help="The text; `-` reads it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="JSON lines, a folder of text files, or a data set on the Hub, as for `loramix eval`."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder or a Hub id. Default: the one that the mixture names.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a data set on the Hub.")] = "test",
    subset: Annotated[str | None, typer.Option(help="The subset of a data set on the Hub that has several.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report to this HTML file, which needs no other file.")
    ] = None,
    leave_one_out: Annotated[
        bool | None,
        typer.Option(
            "--leave-one-out/--no-leave-one-out",
            help="Also measure the loss without each expert, with one more pass over the text for each. "
            "Default: with --html only.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2, help="The number of tokens that are read at once. Default: the base model's positions, at most 1024."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="The most tokens to read.")] = 10_000,
    device: Annotated[
        str, typer.Option(help="The torch device; `auto` chooses the accelerator if there is one.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Show how a mixture routes a text: the leading expert of each token, and the metrics of the routing.

    [bold]Examples[/bold]

    loramix inspect demo --text "def add(a, b):"

    loramix inspect ./mixture --file notes.txt --html routing.html
    """
    from rich.console import Console

    from loramix.analysis.inspection import inspect_texts
    from loramix.analysis.report.report import check_place, write_report
    from loramix.analysis.show.terminal import shown
    from loramix.cli.continuation import open_mixture
    from loramix.evaluation.ablation import can_leave_out

    if sum(given is not None for given in (text, file, data)) != 1:
        raise typer.BadParameter("give one of --text, --file and --data", param_hint="--text")
    if html is not None:
        check_place(html)
    with stdout_kept_for_json(as_json), warnings_as_lines():
        rows = _rows(text, file, data, split, subset)
        opened = open_mixture(mixture, base=base, device=device, routed="name the folder of a mixture")
        texts = [(row.source, row.as_text(opened.tokenizer)) for row in rows]
        model = opened.as_mixture("An inspection shows the routing of a mixture.")
        found = inspect_texts(
            model,
            opened.tokenizer,
            texts,
            title=opened.mixture,
            leave_out=(html is not None and can_leave_out(model)) if leave_one_out is None else leave_one_out,
            window=window,
            limit=limit,
        )
        notes = [] if html is None else write_report(found, html)
    if as_json:
        print_json(found.to_dict())
    elif html is not None:
        typer.echo(f"{html}: " + "\n".join(notes))
    else:
        console = Console(highlight=False)
        console.print(shown(found, console))


def _rows(text: str | None, file: Path | None, data: str | None, split: str, subset: str | None) -> list[Any]:
    from loramix.training import data as reading

    if text is not None:
        return [reading.Row({"text": read_text(text)}, None, "text")]
    if file is not None:
        return [reading.Row({"text": reading.read_text(file)}, None, file.name)]
    assert data is not None
    return reading.read_rows(data, split=split, subset=subset)
