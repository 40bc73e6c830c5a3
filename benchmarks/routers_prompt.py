"""Weights that are chosen once, by a prompt, on the demo mixture: `python -m benchmarks.routers_prompt`.

Bits per byte of what follows the first 64 tokens of a held-out window, lower is better, and the share of windows in
which the expert of the text's domain has the largest weight. X-LoRA and the mean routing need the trained router; the
others need none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import logging

from loramix import demo
from loramix.demo import corpus
from loramix.demo.text import heldout_passages, windows
from loramix.evaluation.losses import token_nats
from loramix.evaluation.passages import Passage, pad
from loramix.model.fixed_routing import mean_scalings
from loramix.model.prompt_choice import Responses, Similarity
from loramix.timing import describe_machine

PROMPT, LEAST, WINDOWS, EXAMPLES = 64, 32, 12, 4
"""Tokens of the prompt and, at least, after it; held-out windows and example windows of each domain."""

Choose = Callable[[Mapping[str, Tensor]], Tensor | None]
"""A prompt -> weights over the experts (E,), or scalings (L, E); None routes each token."""


def rows() -> Iterator[dict[str, Any]]:
    """Each way of choosing: its name, bits per byte, and the share of prompts whose own expert has the most weight."""
    model, tokenizer = demo.load()
    names, alone = model.expert_names, torch.eye(len(model.expert_names))
    found = {name: heldout_passages(tokenizer, name, WINDOWS) for name in corpus.DOMAINS}
    text = [(p, names.index(name)) for name, each in found.items() for p in each if len(p.ids) >= PROMPT + LEAST]
    read = {n: windows(tokenizer, corpus.train_text(n, 100_000), count=EXAMPLES, per_text=1) for n in corpus.DOMAINS}
    padded = {name: pad(each) for name, each in read.items()}
    examples = {name: {"input_ids": ids, "attention_mask": real} for name, (ids, real) in padded.items()}
    similarity = Similarity.to(model, examples)
    queries = [path for path in model.adapted_modules if path.endswith("q_proj")][-1:]
    singles = [_row(model, text, name, lambda _, n=n: alone[n]) for n, name in enumerate(names)]
    yield _row(model, text, "uniform mixture", lambda _: alone.mean(0))
    best = min(singles, key=lambda row: row["bits per byte"])
    yield best | {"choice": f"the best expert alone, {best['choice']}"}
    yield _row(model, text, "X-LoRA, per token", lambda _: None)
    yield _row(model, text, "mean routing of the prompt", lambda prompt: mean_scalings(model, prompt))
    for top_k in (None, 2, 1):
        for what, modules in (("the last block", None), ("its q_proj", queries)):
            for signal in ("norm", "entropy"):
                choice = Responses(top_k, signal, modules)
                name = f"responses in {what}, {signal}, top {top_k or len(names)}"
                yield _row(model, text, name, lambda prompt, choice=choice: choice(model, prompt)[0])
    for temperature in (0.02, 0.1, 0.3, 1.0):
        choice = Similarity(similarity.means, temperature)
        name = f"similarity to {EXAMPLES} windows an expert, temperature {temperature}"
        yield _row(model, text, name, lambda prompt, choice=choice: choice(model, prompt)[0])


@torch.no_grad()
def _row(model: Any, text: Sequence[tuple[Passage, int]], name: str, choose: Choose) -> dict[str, Any]:
    nats, size, right = 0.0, 0, list[bool]()
    for passage, expert in text:
        ids = torch.tensor([passage.ids])
        weights = choose({"input_ids": ids[:, :PROMPT]})
        with nullcontext() if weights is None else model.fixed_scalings(weights):
            logits = model(ids, use_cache=False).logits
        nats += float(token_nats(logits, ids)[0, PROMPT - 1 :].sum())
        size += sum(passage.bytes[PROMPT - 1 :])
        if weights is not None and weights.std() > 0:
            right.append(int(weights.reshape(-1, weights.shape[-1]).mean(0).argmax()) == expert)
    share = sum(right) / len(right) if right else None
    return {"choice": name, "bits per byte": nats / math.log(2) / size, "right": share}


def main() -> None:
    """Print a line for each row, and all of them as JSON."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for row in rows():
        found.append(row)
        right = "" if row["right"] is None else f"{100 * row['right']:.0f} %"
        print(f"{row['choice']:60} {row['bits per byte']:.4f} {right:>5}", flush=True)
    print(json.dumps({"machine": describe_machine(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
