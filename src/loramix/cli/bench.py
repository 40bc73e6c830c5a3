"""`loramix bench`: the speed of a mixture on this machine, compared with its base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loramix.cli.terminal import print_json, stdout_kept_for_json, warnings_as_lines

if TYPE_CHECKING:
    from loramix.timing import Measurement

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"
WAYS = {
    "base model": "the base model without experts",
    "two passes": "a scaling pass and a mixture pass for each token",
    "generate": "the default decoding, which generate chooses by measured speed",
    "fixed routing": "one pass with the same scalings for every token",
}


def bench(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="The mixture: a folder, a Hub id, or `demo`.")],
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder or a Hub id. Default: the one that the mixture names.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = PROMPT,
    tokens: Annotated[int, typer.Option(min=2, help="The number of tokens to generate.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each way of decoding is timed; the median is shown.")
    ] = 7,
    threads: Annotated[int, typer.Option(min=1, help="The number of threads that torch uses.")] = 1,
    device: Annotated[
        str, typer.Option(help="The torch device; `auto` chooses the accelerator if there is one.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Time greedy generation with a mixture and with its base model, in interleaved rounds.

    [bold]Examples[/bold]

    loramix bench demo

    loramix bench ./mixture --tokens 256 --json
    """
    import torch

    from loramix.cli.continuation import open_mixture
    from loramix.timing import describe_machine, generation_times

    with stdout_kept_for_json(as_json), warnings_as_lines():
        torch.set_num_threads(threads)
        opened = open_mixture(mixture, base=base, device=device)
        model = opened.as_mixture("A benchmark compares a mixture with its base model.")
        ids = torch.tensor([opened.tokenizer(prompt)["input_ids"]], device=model.device)
        measured = generation_times(model, ids, tokens, rounds)
    if as_json:
        print_json({"machine": describe_machine(), **_document(measured)})
    else:
        _show(measured, describe_machine())


def _document(measured: Measurement) -> dict[str, Any]:
    ways = {
        name: {
            "seconds": measured.amount(name).median,
            "ratio": measured.ratio(name, to="base model").median,
            "samples": measured.samples[name],
        }
        for name in WAYS
    }
    return {"work": measured.work, "ways": ways, **measured.facts}


def _show(measured: Measurement, machine: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(title=f"{measured.work}, {measured.facts['clock']}", title_justify="left")
    for title in ("", "ms a token", "× base model (quartiles)"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    new = measured.facts["tokens"]
    for name in WAYS:
        amount, ratio = measured.amount(name), measured.ratio(name, to="base model")
        table.add_row(
            name, f"{1e3 * amount.median / new:.2f}", f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"
        )
    console.print(table)
    for name, meaning in WAYS.items():
        console.print(f"{name}: {meaning}", markup=False)
    facts = measured.facts
    drafts = "" if facts["accepted"] is None else f", {facts['accepted']:.0%} of the drafted tokens accepted"
    console.print(f"generate: {facts['forwards per token']:.2f} forwards a token{drafts}", markup=False)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    console.print(f"{machine['processor']}, {machine['torch threads']} thread(s); {versions}", markup=False)
