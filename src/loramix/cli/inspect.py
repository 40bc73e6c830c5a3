"""`loramix inspect`: which expert leads where, in the terminal, as JSON, or as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from loramix.cli.terminal import print_json, read_text, stdout_kept_for_json, warnings_as_lines


def inspect(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="A saved mixture, folder or Hub id; `demo` ships.")],
    text: Annotated[str | None, typer.Option(help="The text to read; - reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file to read.")] = None,
    data: Annotated[
        str | None, typer.Option(help="JSON lines, a folder of text, or a data set's id, as `loramix eval` takes them.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model. Default: the one that the mixture names.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set of the Hub.")] = "test",
    subset: Annotated[str | None, typer.Option(help="Of a data set of the Hub that has several.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one HTML file that needs nothing else.")] = None,
    leave_one_out: Annotated[
        bool | None,
        typer.Option(
            "--leave-one-out/--no-leave-one-out",
            help="Measure the loss without each expert: E more readings. Default: with --html, where it can be.",
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens that are read at once.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="Tokens to read, at most.")] = 10_000,
    device: Annotated[str, typer.Option(help="A torch device; auto: the accelerator where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
) -> None:
    """Look at a mixture's routing of a text: which expert leads each token, and the numbers of all of them.

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
    from loramix.model.build import XLoraModel

    if sum(given is not None for given in (text, file, data)) != 1:
        raise typer.BadParameter("give one of --text, --file and --data", param_hint="--text")
    if html is not None:
        check_place(html)
    with stdout_kept_for_json(as_json), warnings_as_lines():
        rows = _rows(text, file, data, split, subset)
        opened = open_mixture(mixture, base=base, device=device, routed="name the folder of a mixture")
        texts = [(row.source, row.as_text(opened.tokenizer)) for row in rows]
        model = cast(XLoraModel, opened.model)
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
