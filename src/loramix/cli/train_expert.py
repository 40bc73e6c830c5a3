"""`loramix train-expert`: train one LoRA expert on text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loramix.cli.options import as_changes
from loramix.cli.terminal import warnings_as_lines


def train_expert(
    base: Annotated[str, typer.Option(help="The base model: a folder or a Hub id.")],
    data: Annotated[
        str,
        typer.Option(
            help="The training text: JSON lines, a text file, a folder of text files, or a data set on the Hub."
        ),
    ],
    output: Annotated[str, typer.Option(help="The folder for the expert.")],
    rank: Annotated[int, typer.Option(min=1, help="The rank r of the LoRA matrices.")] = 8,
    alpha: Annotated[float, typer.Option(help="The LoRA scaling lora_alpha.")] = 16,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A module to adapt; repeat the option for each. Default: all linear layers."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting of lora or trainer, for example trainer.max_steps=200."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The revision of the base model on the Hub.")] = None,
    dtype: Annotated[
        str, typer.Option(help="The dtype of the base model: auto, float32, bfloat16 or float16.")
    ] = "auto",
    subset: Annotated[str | None, typer.Option(help="The subset of a data set on the Hub that has several.")] = None,
    split: Annotated[str, typer.Option(help="The split of a data set on the Hub.")] = "train",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings and the files, without loading weights, and stop.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, and remove earlier checkpoints.")] = False,
) -> None:
    """Train a LoRA expert on some text. PEFT can load it too.

    [bold]Examples[/bold]

    loramix train-expert --base ./base --data math/ --output experts/math

    loramix train-expert --base ./base --data code.jsonl --output experts/code --rank 16 --set trainer.max_steps=500
    """
    changes = as_changes(change or [], ("lora", "trainer"))

    from loramix.training.check import check_expert
    from loramix.training.run import run_expert_training
    from loramix.training.settings import Data, ExpertSettings

    lora: dict[str, Any] = {"r": rank, "lora_alpha": alpha} | ({"target_modules": target} if target else {})
    groups: dict[str, Any] = {"lora": lora, "trainer": {}}
    for key, value in changes.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    with warnings_as_lines():
        settings = ExpertSettings(
            base=base,
            data=Data(data, split=split, subset=subset),
            output=output,
            revision=revision,
            dtype=dtype,
            **groups,
        )
        if dry_run:
            check_expert(settings)
            print("Everything is in place; no weights were loaded.")
        else:
            print(run_expert_training(settings, resume=not fresh))
