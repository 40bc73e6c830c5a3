"""One pass: what a forward and a decode step cost with each router that needs no scaling pass, by number of experts.

    python -m benchmarks.one_pass --experts 4 8 16 64 --kinds static arrow norm linear evidence

Ratios to the base model in CPU time on one thread, taken round by round. The limit counts multiplications: those of the
base model, of the experts, and of the router, over the base model's. What is to be reached is 1.1 times the limit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import one_token
from benchmarks.limit import Weights
from benchmarks.models import llama, save_experts
from benchmarks.sizes import SIZES, Size
from loramix import XLoraConfig, XLoraLayer, get_peft_model
from loramix.timing import Contender, Measurement, describe_machine, interleave

ROUTERS: dict[str, Callable[[Size], int]] = {
    "static": lambda size: 0,
    "evidence": lambda size: size.experts * size.hidden,
    "arrow": lambda size: _layers(size) * size.experts * size.rank,
    "norm": lambda size: _layers(size) * size.experts * size.rank**2,
    "linear": lambda size: _layers(size) * size.experts**2 * size.rank,
}
"""Multiplications of each router for one token: E · H once, or R, Σ r² and E · R in each layer."""
TARGET = 1.1


def _layers(size: Size) -> int:
    return 7 * size.blocks


def weights_of_one_pass(model: Any) -> Weights:
    """What a mixture multiplies in its one pass, but for the router."""
    layers = [module for module in model.modules() if isinstance(module, XLoraLayer)]
    return Weights(
        backbone=sum(layer.base_layer.weight.numel() for layer in layers),
        experts=sum(sum(p.numel() for p in layer.stack.parameters()) for layer in layers),
        head=model.get_output_embeddings().weight.numel(),
    )


def measure(size: Size, kinds: Sequence[str], rounds: int, folder: Path) -> list[Measurement]:
    """A forward over the prompt and one token after it, of the base model and with each kind of router."""
    base: Any = llama(size)
    adapters = save_experts(folder, size)
    models: dict[str, Any] = {}
    for kind in kinds:
        config = XLoraConfig(adapters=adapters, router=kind, task_type="CAUSAL_LM")
        models[kind] = get_peft_model(llama(size), config).eval()
    prompt = torch.randint(size.vocabulary, (1, size.prompt), generator=torch.Generator().manual_seed(0))
    weights = weights_of_one_pass(models[kinds[0]])
    found: list[Measurement] = []
    works: dict[str, tuple[Callable[[Any, Tensor], Callable[[], None]], float]] = {
        f"forward of {size.prompt} tokens": (_forward, size.attention((size.prompt + 1) / 2)),
        f"one token after {size.prompt}": (one_token, size.attention(size.prompt + 1)),
    }
    for work, (make, attention) in works.items():
        contenders = [
            Contender("base", make(base, prompt)),
            *(Contender(k, make(m, prompt)) for k, m in models.items()),
        ]
        samples = interleave(contenders, rounds, warm_ups=3)
        plain = weights.backbone + weights.head + attention
        for kind in kinds:
            limit = (plain + weights.experts + ROUTERS[kind](size)) / plain
            pair = {"base": samples["base"], "loramix": samples[kind]}
            facts = {"router": kind, "experts": size.experts}
            found.append(Measurement(work, pair, limit, TARGET * limit, facts))
    return found


def _forward(model: Any, prompt: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            model(input_ids=prompt, use_cache=False)

    return forward


def main() -> None:
    """Print a line for each measurement, and all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--kinds", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the samples here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    machine, results = describe_machine(), list[Measurement]()
    print(json.dumps(machine))
    for experts in given.experts:
        with tempfile.TemporaryDirectory() as folder:
            size = replace(SIZES["small"], experts=experts)
            for found in measure(size, given.kinds, given.rounds, Path(folder)):
                ratio, limit = found.ratio("loramix"), found.limit or 1.0
                spread = f"{ratio.median:.3f} [{ratio.lower:.3f}–{ratio.upper:.3f}]"
                name = f"E {experts:2} {found.facts['router']:7} {found.work:22}"
                print(f"{name} {spread}  limit {limit:.3f}  {ratio.median / limit:.3f} of it", flush=True)
                results.append(found)
    if given.json is not None:
        document = {"machine": machine, "measurements": [asdict(found) for found in results]}
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
