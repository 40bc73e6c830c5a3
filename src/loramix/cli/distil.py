"""`loramix distil`: a mixture's router, learned by one that needs one pass."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from loramix.cli.terminal import print_json, stdout_kept_for_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.training.distil import Distillation


class Student(str, Enum):  # noqa: UP042 - typer shows its values
    """The routers that learn from another."""

    EVIDENCE = "evidence"
    LINEAR = "linear"
    STATIC = "static"


def distil(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="The mixture: a folder, a Hub id, or `demo`.")],
    data: Annotated[
        str,
        typer.Option(help="Text without labels: JSON lines, a text file, a folder of text files, or a data set."),
    ],
    output: Annotated[Path, typer.Option(help="The folder for the new mixture.")],
    to: Annotated[Student, typer.Option(help="The kind of the new router.")] = Student.LINEAR,
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder or a Hub id. Default: the one that the mixture names.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a data set on the Hub.")] = "train",
    subset: Annotated[str | None, typer.Option(help="The subset of a data set on the Hub that has several.")] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2, help="The number of tokens in a passage. Default: the base model's positions, at most 1024."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="The most passages; a fifth of them is held out.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Passages in a batch.")] = 4,
    steps: Annotated[int, typer.Option(min=0, help="Steps of Adam for `linear`, each with one batch.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Give a mixture a router that needs one pass, which learns from the router that it has.

    `evidence` reads the input embeddings, `linear` each layer's low-rank activation; `static` is the teacher's mean and
    can be merged.
    The experts stay as they are. What is printed is measured on the passages that are held out.

    [bold]Examples[/bold]

    loramix distil ./mixture --data texts/ --output ./one-pass

    loramix distil demo --data train.jsonl --to static --output ./static --json
    """
    from loramix.cli.continuation import open_mixture
    from loramix.training.check import check_writable
    from loramix.training.data import read_rows
    from loramix.training.distil import distil_router
    from loramix.training.run import unlabelled_batches

    with stdout_kept_for_json(as_json), warnings_as_lines():
        check_writable(output)
        rows = read_rows(data, split=split, subset=subset)
        opened = open_mixture(mixture, base=base)
        model = opened.as_mixture("A distillation gives a mixture another router.")
        batches = unlabelled_batches(model, opened.tokenizer, rows, window=window, limit=limit, size=batch)
        done = distil_router(model, to.value, batches, steps=steps)
        model.save_pretrained(output)
        opened.tokenizer.save_pretrained(output)
    if as_json:
        print_json({"mixture": str(output), **done.to_dict()})
    else:
        _show(done)
        print(output)


def _show(done: Distillation) -> None:
    table = Table("router", "nats a token", title="Held-out passages: lower is better", title_justify="left")
    table.add_row("uniform", f"{done.uniform:.4f}")
    table.add_row("teacher", f"{done.teacher:.4f}")
    table.add_row(f"student ({done.kind})", f"{done.student:.4f}")
    console = Console(highlight=False)
    console.print(table)
    if done.share is not None:
        console.print(f"{done.share:.0%} of the teacher's gain over the uniform mixture", markup=False)
    closed = "" if done.closed_form is None else f", closed form {done.closed_form:.4f}"
    console.print(
        f"next token, KL to the teacher: mean teacher {done.start:.4f}{closed}, student {done.divergence:.4f}"
    )
    console.print(f"scalings: KL to the teacher {done.scalings:.4f}, same largest expert {done.agreement:.0%}")
