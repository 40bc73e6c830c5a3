"""What a router's start and each objective give on the demo mixture: `python -m benchmarks.router`.

Writes docs/router.json and docs/router.md. Every run begins at the same seed and reads the same text; the table has
bits per byte of held-out text, lower is better.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, logging

from loramix import XLoraModel, get_peft_model
from loramix.demo import bundle, corpus
from loramix.demo.router import router_arguments, router_config, router_windows
from loramix.demo.text import heldout_passages, switching_passages, windows
from loramix.evaluation.passages import Passage, pad
from loramix.evaluation.scores import measure, total
from loramix.timing import describe_machine
from loramix.training import RouterCallback, RouterObjectives, init_router

DOCS = Path(__file__).parent.parent / "docs"
WINDOWS = 12
BATCH = 8

PAGE = """# The router's start, and its objectives

Measured on the demo mixture by `python -m benchmarks.router`: bits per byte of held-out text ({windows} windows a
domain, and {windows} that switch domain), lower is better. {machine}

## Starts

`init_router(model, …)`, then {steps} steps of {batch} windows with the stock Trainer. Prompts: {prompts} short training
texts an expert; labels: {labelled} training windows an expert.

{starts}

An initialisation that already routes well gains little from {steps} such steps, and may lose a little. Compare before
and after on held-out text (`loramix eval`) before a longer training, and use a lower learning rate.

## Objectives

Each case is trained twice, without the objective and with it, from the same start and with the same seed. `mixed` is
the text of all domains. If the training text is of one domain, the objective preserves the others, at a small cost.

{objectives}
"""

STEPS, PROMPTS, LABELLED = 40, 4, 16


def mixture(**config: Any) -> XLoraModel:
    """The demo's experts with a router that has learnt nothing."""
    torch.manual_seed(0)
    base = bundle.base()
    settings = router_config(base.config.hidden_size, bundle.experts())
    for name, value in config.items():
        setattr(settings, name, value)
    return get_peft_model(base, settings)


def columns(tokenizer: Any) -> dict[str, list[Passage]]:
    """The held-out text."""
    found = {domain: heldout_passages(tokenizer, domain, WINDOWS) for domain in corpus.DOMAINS}
    return found | {"switching": switching_passages(tokenizer, WINDOWS)}


def figures(model: XLoraModel, text: dict[str, list[Passage]]) -> dict[str, float]:
    """Bits per byte by column, `mixed` for all domains together."""
    scores = {name: total(measure(model, passages).values()) for name, passages in text.items()}
    mixed = total(scores[domain] for domain in corpus.DOMAINS)
    return {name: score.bits_per_byte for name, score in scores.items()} | {"mixed": mixed.bits_per_byte}


class Labelled:
    """Training windows with the number of their domain's expert."""

    def __init__(self, tokenizer: Any, count: int, domains: Sequence[str]) -> None:
        each = -(-count // len(domains))
        pools = [windows(tokenizer, corpus.train_text(d, 400_000), count=each, per_text=2) for d in domains]
        numbers = [corpus.DOMAINS.index(d) for d in domains]
        self.rows = [(ids, n) for row in zip(*pools, strict=False) for ids, n in zip(row, numbers, strict=True)][:count]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, number = self.rows[index]
        return {"input_ids": ids, "expert_ids": number}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, with the experts' numbers where the rows have them."""
    ids, real = pad([row["input_ids"] for row in rows])
    batch = {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}
    if "expert_ids" in rows[0]:
        batch["expert_ids"] = torch.tensor([row["expert_ids"] for row in rows])
    return batch


def train(
    model: XLoraModel, data: Any, steps: int, objectives: RouterObjectives | None, **changes: Any
) -> dict[str, float]:
    """Train the router, and say what its routing did at the end."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = router_arguments(Path(folder), steps, BATCH)
        arguments.disable_tqdm = True
        arguments.logging_steps = steps
        for name, value in changes.items():
            setattr(arguments, name, value)
        callback = RouterCallback(objectives)
        trainer = Trainer(
            cast(Any, model), arguments, train_dataset=data, data_collator=cast(Any, collate), callbacks=[callback]
        )
        trainer.train()
    model.eval()
    return {k: float(v) for k, v in trainer.state.log_history[0].items() if k.startswith("router/")}


def starts(tokenizer: Any, text: dict[str, list[Passage]]) -> list[dict[str, Any]]:
    """Each start before and after training."""
    pools = {d: windows(tokenizer, corpus.train_text(d, 400_000), count=64, per_text=2) for d in corpus.DOMAINS}
    prompts = {d: [tokenizer.decode(ids[1:65]) for ids in pool[-PROMPTS:]] for d, pool in pools.items()}
    batches = [
        {"input_ids": torch.tensor([ids]), "expert_ids": torch.tensor([number])}
        for number, pool in enumerate(pools.values())
        for ids in pool[:LABELLED]
    ]
    sources: dict[str, dict[str, Any]] = {
        "random": {},
        "zeros": {},
        "prompts": {"tokenizer": tokenizer, "prompts": prompts},
        "labels": {"batches": batches},
    }
    found: list[dict[str, Any]] = []
    for method, source in sources.items():
        model = mixture()
        if method != "random":
            init_router(model, cast(Any, method), **source)
        before = figures(model, text)
        train(model, router_windows(tokenizer, STEPS * BATCH), STEPS, None)
        found.append({"start": method, "before": before, "after": figures(model, text)})
        print(found[-1], flush=True)
    return found


def objectives(tokenizer: Any, text: dict[str, list[Passage]]) -> list[dict[str, Any]]:
    """Each objective where it should help."""
    lopsided = Labelled(tokenizer, 30 * BATCH, ["code"])
    labelled = Labelled(tokenizer, 10 * BATCH, corpus.DOMAINS)
    usual = router_windows(tokenizer, STEPS * BATCH)
    cases: list[tuple[str, str, Any, int, RouterObjectives, dict[str, Any], dict[str, Any]]] = [
        ("supervised 1", "10 steps of labelled text", labelled, 10, RouterObjectives(supervised=1.0), {}, {}),
        (
            "entropy_floor 1 at 0.9",
            "30 steps of code alone: what is kept of the other domains",
            lopsided,
            30,
            RouterObjectives(entropy_floor=1.0, least_entropy=0.9),
            {},
            {},
        ),
        (
            "load_balance 0.1",
            "30 steps of code alone: what is kept of the other domains",
            lopsided,
            30,
            RouterObjectives(load_balance=0.1),
            {},
            {},
        ),
        (
            "z_loss 0.01",
            "a learning rate of 0.2, which makes logits large",
            usual,
            STEPS,
            RouterObjectives(z_loss=0.01),
            {},
            {"learning_rate": 0.2},
        ),
        (
            "temperature 16 → 1",
            "a learning rate of 0.2, which makes logits large",
            usual,
            STEPS,
            RouterObjectives(temperature=(16.0, 1.0)),
            {},
            {"learning_rate": 0.2},
        ),
    ]
    found: list[dict[str, Any]] = []
    for name, case, data, steps, aims, config, changes in cases:
        row: dict[str, Any] = {"objective": name, "case": case}
        for label, chosen in (("without", None), ("with", aims)):
            model = mixture(**config)
            row[f"routing {label}"] = train(model, data, steps, chosen, **changes)
            row[label] = figures(model, text)
        found.append(row)
        print(row, flush=True)
    return found


def page(result: dict[str, Any]) -> str:
    """The page's text."""

    def cells(row: dict[str, float]) -> str:
        return f"{row['mixed']:.3f} | {row['switching']:.3f}"

    start_rows = [f"| {r['start']} | {cells(r['before'])} | {cells(r['after'])} |" for r in result["starts"]]
    aim_rows = [
        f"| {r['objective']} | {r['case']} | {cells(r['without'])} | {cells(r['with'])} |" for r in result["objectives"]
    ]
    machine, versions = result["machine"]["processor"], result["machine"]["versions"]
    return PAGE.format(
        windows=WINDOWS,
        steps=STEPS,
        batch=BATCH,
        prompts=PROMPTS,
        labelled=LABELLED,
        machine=f"{machine}, torch {versions['torch']}, transformers {versions['transformers']}.",
        starts="\n".join(
            [
                "| start | mixed, before | switching, before | mixed, after | switching, after |",
                "|---|---|---|---|---|",
                *start_rows,
            ]
        ),
        objectives="\n".join(
            [
                "| objective | case | mixed, without | switching, without | mixed, with | switching, with |",
                "|---|---|---|---|---|---|",
                *aim_rows,
            ]
        ),
    )


def main() -> None:
    """Measure all of it and write the page."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = bundle.tokenizer()
    text = columns(tokenizer)
    result = {
        "machine": describe_machine(),
        "starts": starts(tokenizer, text),
        "objectives": objectives(tokenizer, text),
    }
    (DOCS / "router.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (DOCS / "router.md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
