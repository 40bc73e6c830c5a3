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
            metavar="MIXTURE", help="The mixture: a folder, a Hub id, or `demo`, the one that ships with loramix."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue; `-` reads it from stdin.")],
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder or a Hub id. Default: the one that the mixture names.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="The most tokens to generate.")] = 64,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Sample tokens instead of taking the most likely one.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.001, help="The sampling temperature; lower values make likely tokens likelier."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1.0, help="Sample from the most likely tokens that together have this probability."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="The random seed; the same seed gives the same text.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="The torch device; `auto` chooses the accelerator if there is one.")
    ] = "auto",
    fix_routing: Annotated[
        str | None,
        typer.Option(
            metavar="BY",
            help="Weigh the experts once, by the prompt, and decode in one pass: `mean` of its scalings, `responses` "
            "of the experts, or similarity to the texts in a JSON file of expert name -> texts.",
        ),
    ] = None,
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Colour each token by its leading expert.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Continue a prompt with a mixture; the text is printed while it is generated.

    [bold]Examples[/bold]

    loramix generate demo --prompt "def read_lines(path):"

    loramix generate ./mixture --prompt "2 + 2 =" --max-new-tokens 8 --show-experts

    cat question.txt | loramix generate ./mixture --prompt - --do-sample --temperature 0.7 --seed 1 --json
    """
    if not do_sample and (temperature, top_p, seed) != (None, None, None):
        raise typer.BadParameter("--temperature, --top-p and --seed belong to --do-sample")
    if show_experts and fix_routing is not None:
        raise typer.BadParameter("with --fix-routing, all tokens have the same experts: leave out --show-experts")

    from loramix.cli.continuation import Sampling, continue_text, fix_by_prompt, open_mixture

    text = read_text(prompt)
    sampling = Sampling(temperature, top_p, seed) if do_sample else None
    with stdout_kept_for_json(as_json), warnings_as_lines():
        needed = "leave out --show-experts, or name a mixture" if show_experts else None
        opened = open_mixture(mixture, base=base, device=device, routed=needed)
        weights = None if fix_routing is None else fix_by_prompt(opened, text, fix_routing)
        written = continue_text(opened, text, max_new_tokens, sampling, stream=not as_json, show_experts=show_experts)
    if as_json:
        print_json(written.document() | ({} if weights is None else {"weights": weights}))
