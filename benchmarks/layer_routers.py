"""What each layer router gives on the demo mixture: `python -m benchmarks.layer_routers`.

Prints bits per byte of held-out text, lower is better, and the share of the shipped router's gain over the uniform
mixture. No router sees held-out text; the text to calibrate and to distil on has no labels.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import logging

from benchmarks.router import columns, figures
from loramix import XLoraConfig, XLoraModel, demo, get_peft_model
from loramix.demo import corpus
from loramix.demo.router import router_windows
from loramix.demo.text import windows
from loramix.evaluation.passages import pad
from loramix.timing import describe_machine
from loramix.training import distil_router, init_router

LABELLED = 16


def mixture(kind: str, **config: Any) -> XLoraModel:
    """The demo's experts with a new router."""
    base = demo.base()
    settings = XLoraConfig(hidden_size=base.config.hidden_size, adapters=demo.experts(), router=kind, **config)
    model = get_peft_model(base, settings)
    model.eval()
    return model


def batches(texts: Sequence[list[int]], size: int = 4, **labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Windows as batches."""
    found = [pad(texts[i : i + size]) for i in range(0, len(texts), size)]
    return [{"input_ids": ids, "attention_mask": real, **labels} for ids, real in found]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=int, default=240, help="windows without labels")
    parser.add_argument("--steps", type=int, default=100, help="of the distillation")
    given = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", UserWarning)
    tokenizer = demo.tokenizer()
    text = columns(tokenizer)
    found = router_windows(tokenizer, given.text, seed=1)
    unlabelled = batches([found[i]["input_ids"] for i in range(len(found))])
    rows: dict[str, dict[str, float]] = {}

    def measured(name: str, model: XLoraModel) -> None:
        rows[name] = figures(model, text)
        print(name, {column: round(value, 4) for column, value in rows[name].items()}, flush=True)

    print(describe_machine())
    teacher, _ = demo.load()
    experts = len(teacher.expert_names)
    with teacher.fixed_scalings([1 / experts] * experts):
        measured("uniform", teacher)
    measured("classifier, two passes", teacher)
    measured("arrow", mixture("arrow"))
    norm = mixture("norm")
    measured("norm, not calibrated", norm)
    init_router(norm, "texts", batches=unlabelled[:8])
    measured("norm, calibrated", norm)
    linear = mixture("linear")
    labelled = [
        batch
        for number, domain in enumerate(corpus.DOMAINS)
        for batch in batches(
            windows(tokenizer, corpus.train_text(domain, 300_000), count=LABELLED, per_text=2),
            expert_ids=torch.full((4,), number),
        )
    ]
    init_router(linear, "labels", batches=labelled)
    measured(f"linear, from {LABELLED} labelled windows an expert", linear)
    done = distil_router(teacher, "linear", unlabelled, steps=given.steps)
    measured("linear, distilled", teacher)
    gain = rows["uniform"]["mixed"] - rows["classifier, two passes"]["mixed"]
    shares = {name: (rows["uniform"]["mixed"] - row["mixed"]) / gain for name, row in rows.items()}
    print(json.dumps({"rows": rows, "share": shares, "distillation": done.to_dict()}, indent=1))


if __name__ == "__main__":
    main()
