"""`loramix generate`: continue a prompt with a mixture."""

from __future__ import annotations

from typing import Annotated

import typer

from loramix.cli.terminal import MAX_SEED, print_json, read_text, stdout_kept_for_json, warnings_as_lines

MAX_TOKENS = 1_000_000


def generate(
    mixture: Annotated[
        str,
        typer.Argument(
            metavar="MIXTURE", help="A saved mixture, folder or Hub id; `demo` is the one that ships with loramix."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue; `-` reads it from stdin.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, folder or Hub id. Default: the one that the mixture names.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Stop after this many tokens.")] = 64,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Draw tokens at random instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(min=0.001, help="Of the draw; lower is more sober.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.001, max=1.0, help="Draw from this much probability.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="The same seed draws the same text.")] = None,
    device: Annotated[str, typer.Option(help="A torch device; `auto` is the accelerator where there is one.")] = "auto",
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Colour each token by the expert that led when it was written.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
) -> None:
    """Continue a prompt with a mixture, printing the text as it is written.

    [bold]Examples[/bold]

    loramix generate demo --prompt "def read_lines(path):"

    loramix generate ./mixture --prompt "2 + 2 =" --max-new-tokens 8 --show-experts

    cat question.txt | loramix generate ./mixture --prompt - --do-sample --temperature 0.7 --seed 1 --json
    """
    if not do_sample and (temperature, top_p, seed) != (None, None, None):
        raise typer.BadParameter("--temperature, --top-p and --seed belong to --do-sample")

    from loramix.cli.continuation import Sampling, continue_text, open_mixture

    text = read_text(prompt)
    sampling = Sampling(temperature, top_p, seed) if do_sample else None
    with stdout_kept_for_json(as_json), warnings_as_lines():
        needed = "leave out --show-experts, or name a mixture" if show_experts else None
        opened = open_mixture(mixture, base=base, device=device, routed=needed)
        written = continue_text(opened, text, max_new_tokens, sampling, stream=not as_json, show_experts=show_experts)
    if as_json:
        print_json(written.document())
