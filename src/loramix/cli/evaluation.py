"""`loramix eval`: the demo's table for any mixture and any text."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loramix.cli.terminal import print_json, stdout_kept_for_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.evaluation.scores import Evaluation


class Figure(str, Enum):  # noqa: UP042 - typer shows its values
    """What the table shows."""

    BITS_PER_BYTE = "bits-per-byte"
    LOSS = "loss"
    PERPLEXITY = "perplexity"


TITLES = {"bits_per_byte": "Bits per byte", "loss": "Nats a token", "perplexity": "Perplexity"}


def evaluate(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="The mixture: a folder, a Hub id, or `demo`.")],
    data: Annotated[
        str, typer.Option(help="The text: JSON lines, a text file, a folder of text files, or a data set on the Hub.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder or a Hub id. Default: the one that the mixture names.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a data set on the Hub.")] = "test",
    subset: Annotated[str | None, typer.Option(help="The subset of a data set on the Hub that has several.")] = None,
    figure: Annotated[Figure, typer.Option(help="The figure that the table shows.")] = Figure.BITS_PER_BYTE,
    window: Annotated[
        int | None,
        typer.Option(
            min=2, help="The number of tokens in a passage. Default: the base model's positions, at most 1024."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most passages of each group.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Measure the loss on text: base model, each expert alone, uniform mixture, mixture, oracle.

    Texts are grouped by the expert that they name. The oracle takes the best expert of each group.
    The mixture is also measured without each expert (leave-one-out).

    [bold]Examples[/bold]

    loramix eval ./mixture --data test.jsonl

    loramix eval demo --data texts/ --figure perplexity --limit 50 --json
    """
    from loramix.cli.continuation import open_mixture
    from loramix.training.data import read_rows
    from loramix.training.run import evaluate_rows

    with stdout_kept_for_json(as_json), warnings_as_lines():
        rows = read_rows(data, split=split, subset=subset)
        opened = open_mixture(mixture, base=base)
        model = opened.as_mixture("An evaluation compares the experts of a mixture.")
        evaluation = evaluate_rows(model, opened.tokenizer, rows, window=window, limit=limit)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        show(evaluation, figure.value.replace("-", "_"))


def show(evaluation: Evaluation, figure: str) -> None:
    """Print the table, and what the mixture loses without each expert."""
    from loramix.evaluation.scores import ORACLE, columns
    from loramix.evaluation.table import scores_table

    console = Console(highlight=False)
    console.print(scores_table(TITLES[figure], columns(evaluation, figure), {ORACLE: "best expert (oracle)"}))
    for expert, difference in evaluation.leave_one_out().items():
        console.print(f"without {expert}: loss {difference:+.4f}", markup=False)
