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
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="A saved mixture, folder or Hub id; `demo` ships.")],
    data: Annotated[str, typer.Option(help="JSON lines, a text file, a folder of text, or a data set's id.")],
    base: Annotated[str | None, typer.Option(help="The base model. Default: the one that the mixture names.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set of the Hub.")] = "test",
    subset: Annotated[str | None, typer.Option(help="Of a data set of the Hub that has several.")] = None,
    figure: Annotated[Figure, typer.Option(help="What the table shows.")] = Figure.BITS_PER_BYTE,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens of a passage.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Passages of each group, at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Measure a mixture on text: base, each expert, uniform, mixture, oracle, and without each expert.

    Rows are grouped by the expert that they name; the oracle takes the best expert of each group.

    [bold]Examples[/bold]

    loramix eval ./mixture --data test.jsonl

    loramix eval demo --data texts/ --figure perplexity --limit 50 --json
    """
    from loramix.cli.continuation import open_mixture
    from loramix.errors import ConfigurationError
    from loramix.model.build import XLoraModel
    from loramix.training.data import read_rows
    from loramix.training.run import evaluate_rows

    with stdout_kept_for_json(as_json), warnings_as_lines():
        rows = read_rows(data, split=split, subset=subset)
        opened = open_mixture(mixture, base=base)
        if not isinstance(opened.model, XLoraModel):
            raise ConfigurationError(
                "An evaluation compares the experts of a mixture.",
                received=f"the single expert {mixture!r}",
                remedy="name the folder of a mixture",
            )
        evaluation = evaluate_rows(opened.model, opened.tokenizer, rows, window=window, limit=limit)
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
