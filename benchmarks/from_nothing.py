"""Mixtures trained from nothing against one LoRA of the same total rank: `python -m benchmarks.from_nothing`.

On the demo's base model, with C++, Python and English from installed packages in equal parts, which it was not trained
on: the same tokens in the same order, the same steps, and the same learning rates to choose from, for each. A mixture's
experts are new and train with its router. Bits per byte of held-out text, lower is better; the learning rate is chosen
on other held-out text.

Writes docs/from_nothing.json.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import logging

from benchmarks.routers import bits_per_byte
from benchmarks.routers_mixtures import installed_passages, installed_text, train
from loramix import LoraConfig, XLoraConfig, get_peft_model
from loramix.config.base import PeftConfig
from loramix.demo import bundle
from loramix.demo.text import causal_batch, windows
from loramix.evaluation.passages import Passage
from loramix.timing import Contender, describe_machine, interleave, spread
from loramix.training import RouterCallback, RouterObjectives, init_router
from loramix.training.objectives import LOAD_BALANCE

DOCS = Path(__file__).parent.parent / "docs"
EXPERTS, RANK = 8, 4
SEEDS = (0, 1)
RATES = (3e-3, 6e-3, 1.2e-2)
BALANCES = (0.0, 0.1)
"""Beside the default."""
LENGTH, BATCH = 128, 6
ROUNDS = 9
HELD_OUT = 6
"""Held-out passages of each domain to choose the learning rate by, and as many to report."""

TOP = 2
SPARSE = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": TOP}
MIXTURES: Mapping[str, dict[str, Any]] = {
    "classifier, dense": {},
    "classifier, top 2": SPARSE,
    "linear, dense": {"router": "linear"},
    "linear, top 2": {"router": "linear", **SPARSE},
}
ONE, MORE, SMALL = "one LoRA", "one LoRA, half as many tokens again", "classifier, dense, alpha not raised"
BALANCED = "classifier, top 2"
"""The row in which load balance is varied."""
ZEROS = ", started with zeros"
"""After the name of a classifier that starts with every expert alike."""


@dataclass(frozen=True)
class Text:
    """Rows to train on, and held-out passages: to choose by, and to report."""

    rows: list[list[int]]
    choosing: list[Passage]
    reported: list[Passage]


@dataclass(frozen=True)
class Run:
    """One training, and what came out.

    Attributes:
        choosing: bits per byte of the text to choose by.
        reported: bits per byte of the other.
        dead: dead experts on the last text of the training.
    """

    name: str
    rate: float
    seed: int
    load_balance: float
    choosing: float
    reported: float
    dead: int


def text(steps: int, seed: int) -> Text:
    """The text of a seed."""
    tokenizer, rng, found = bundle.tokenizer(), random.Random(seed), Text([], [], [])
    for name, (kept, held) in installed_text().items():
        pool = [ids[:LENGTH] for ids in windows(tokenizer, kept, per_text=8, least=LENGTH)]
        found.rows.extend(rng.sample(pool, steps * BATCH // 3))
        passages = [p for p in installed_passages(name, held) if len(p.groups) >= LENGTH][: 2 * HELD_OUT]
        found.choosing.extend(passages[::2])
        found.reported.extend(passages[1::2])
    rng.shuffle(found.rows)
    return found


def configuration(name: str, hidden_size: int) -> PeftConfig:
    """What is trained under a name."""

    def lora(rank: int, raised: int = 1) -> LoraConfig:
        alpha = 2 * rank * raised
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")

    if name == ONE:
        return lora(EXPERTS * RANK)
    settings = MIXTURES.get(name.removesuffix(ZEROS), {})
    raised = 1 if name == SMALL else settings.get("top_k_lora", EXPERTS)  # as a run's default: 1 / the first scaling
    experts = {f"e{number}": lora(RANK, raised) for number in range(EXPERTS)}
    return XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden_size, adapters=experts, **settings)


def run(name: str, given: Text, *, rate: float, seed: int, load_balance: float = LOAD_BALANCE) -> Run:
    """Train one of them."""
    base = bundle.base()
    torch.manual_seed(seed)
    model: Any = get_peft_model(base, configuration(name, base.config.hidden_size))
    if name.endswith(ZEROS):
        init_router(model, "zeros")
    callback = RouterCallback(RouterObjectives(load_balance=load_balance))
    steps = len(given.rows) // BATCH
    with warnings.catch_warnings(action="ignore"):
        callbacks = [] if name == ONE else [callback]
        train(model, given.rows, rate=rate, steps=steps, batch=BATCH, warmup=steps // 10, callbacks=callbacks)
    model.eval()
    choosing, reported = (bits_per_byte(model, passages) for passages in (given.choosing, given.reported))
    balance = 0.0 if name == ONE else load_balance
    found = Run(name, rate, seed, balance, choosing, reported, len(callback.dead))
    print(*(f"{key}={value}" for key, value in asdict(found).items()), flush=True)
    return found


def best(name: str, texts: Mapping[int, Text]) -> list[Run]:
    """The runs of all seeds with the learning rate that is best for the first one, on the text to choose by."""
    first, *others = texts
    tried = [run(name, texts[first], rate=rate, seed=first) for rate in RATES]
    chosen = min(tried, key=lambda each: each.choosing)
    return [chosen, *(run(name, texts[seed], rate=chosen.rate, seed=seed) for seed in others)]


def row(runs: Sequence[Run]) -> dict[str, Any]:
    """A row of a table: runs that differ by their seed."""
    return {
        "name": runs[0].name,
        "rate": runs[0].rate,
        "load_balance": runs[0].load_balance,
        "bits_per_byte": [each.reported for each in runs],
        "mean": fmean(each.reported for each in runs),
        "dead": [each.dead for each in runs],
    }


def rows(texts: Mapping[int, Text], longer: Mapping[int, Text]) -> Iterator[dict[str, Any]]:
    """The rows of the table.

    Each is at its best learning rate; at that rate, what more text does for one LoRA, and for a mixture the start and
    load balance.
    """
    for name in (ONE, *MIXTURES, SMALL):
        runs = best(name, texts)
        yield row(runs)
        rate = runs[0].rate
        if name == ONE:
            yield row([run(ONE, given, rate=rate, seed=seed) for seed, given in longer.items()]) | {"name": MORE}
        if name in ("classifier, dense", "classifier, top 2"):
            yield row([run(name + ZEROS, given, rate=rate, seed=seed) for seed, given in texts.items()])
        for weight in BALANCES if name == BALANCED else ():
            yield row([run(name, given, rate=rate, seed=seed, load_balance=weight) for seed, given in texts.items()])


def table(result: Mapping[str, Any]) -> str:
    """The rows as the table of docs/training.md; the times are multiples of that of one LoRA."""
    lines = [
        "| trained | load balance | learning rate | bits per byte | of each seed | time of a step | dead experts |",
        "|---|---|---|---|---|---|---|",
        f"| nothing: the base model | | | {result['base']:.3f} | | | |",
    ]
    for each in result["rows"]:
        step = result["step_seconds"].get(each["name"])
        cells = [
            each["name"],
            "" if each["name"] in (ONE, MORE) else f"{each['load_balance']:g}",
            f"{each['rate']:g}",
            f"{each['mean']:.3f}",
            ", ".join(f"{value:.3f}" for value in each["bits_per_byte"]),
            f"{step['ratio']:.2f}" if step else "",
            "" if each["name"] in (ONE, MORE) else ", ".join(map(str, each["dead"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def step_seconds(given: Text) -> dict[str, dict[str, float]]:
    """CPU seconds of a forward and backward of each, interleaved; and each as a multiple of that of one LoRA."""
    batch = causal_batch([{"input_ids": ids} for ids in given.rows[:BATCH]])
    contenders = list[Contender]()
    for name in (ONE, *MIXTURES):
        base = bundle.base()
        model: Any = get_peft_model(base, configuration(name, base.config.hidden_size)).train()

        def step(model: Any = model) -> None:
            model(**batch).loss.backward()

        contenders.append(Contender(name, step))
    times = interleave(contenders, ROUNDS)
    found = dict[str, dict[str, float]]()
    for name, samples in times.items():
        ratios = [own / one for own, one in zip(samples, times[ONE], strict=True) if own and one]
        ratio = spread(ratios)
        seconds = spread([own for own in samples if own]).median
        found[name] = {"seconds": seconds, "ratio": ratio.median, "lower": ratio.lower, "upper": ratio.upper}
    return found


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of each training, of 768 tokens")
    steps = parser.parse_args().steps
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    texts = {seed: text(steps, seed) for seed in SEEDS}
    start = bits_per_byte(bundle.base(), texts[SEEDS[0]].reported)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "experts": EXPERTS,
        "rank": RANK,
        "base": start,
        "step_seconds": step_seconds(texts[SEEDS[0]]),
        "rows": list(rows(texts, {seed: text(steps * 3 // 2, seed) for seed in SEEDS})),
    }
    print(table(result))
    (DOCS / "from_nothing.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
