"""The most bytes that are held at once, beyond parameters, and the bytes of what is kept: parameters and caches.

The limits are arithmetic, in float32: the base model's own peak, and what a mixture keeps beside it at that point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import Models
from loramix.timing import Measurement, Samples, peak_bytes

TEXT, NEW = 1024, 64
FLOAT = 4


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Peaks of a forward, of prefill and of `generate`; parameters; the cache after prefill. Exact: one round each."""
    small = models.size.hidden < 512
    length, new = (8, 3) if small else (TEXT, NEW)
    ids = torch.randint(models.size.vocabulary, (1, length), generator=torch.Generator().manual_seed(2))
    every = {"base": models.base, "loramix": models.loramix, "PEFT": models.peft}
    cached = {"use_cache": True}

    def last(name: str, model: Any) -> None:
        model(input_ids=ids, logits_to_keep=1, **(cached if name != "PEFT" else {}))

    def generate(model: Any, prompt: torch.Tensor = models.prompt, new: int = new, **how: Any) -> None:
        mask = torch.ones_like(prompt)
        model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, **how)

    size, read = models.size, models.size.prompt + new - 1
    second = size.cache_bytes(length)
    routed = FLOAT * length * (size.hidden + 2 * size.experts * size.rank)
    forward = _peaks({n: lambda m=m: m(input_ids=ids, use_cache=False) for n, m in every.items()})
    prefill = _peaks({n: lambda n=n, m=m: last(n, m) for n, m in every.items()})
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: generate(models.base),
        "loramix": lambda: generate(models.loramix, lockstep=False),
        "PEFT": lambda: generate(models.peft, ids[:, :read], 1),  # its last step alone: a lower bound
        "loramix, lockstep": lambda: generate(models.loramix, lockstep=True),
    }
    tokens = f"{size.prompt} + {new} tokens"
    return [
        _kept("parameters", {n: _parameters(m) for n, m in every.items()}, FLOAT * models.weights.experts),
        _kept(
            f"cache of {length} tokens",
            {n: _cache(every[n], ids) for n in ("base", "loramix")},
            second,
        ),
        _kept(f"forward of {length} tokens, peak", forward, 0),
        _kept(f"prefill of {length} tokens, peak", prefill, second + routed),
        _kept(f"generate {tokens}, peak", _peaks(calls), size.cache_bytes(read)),
    ]


@torch.no_grad()
def _peaks(calls: dict[str, Callable[[], object]]) -> dict[str, int]:
    return {name: peak_bytes(call) for name, call in calls.items()}


def _parameters(model: Any) -> int:
    return sum(tensor.nbytes for tensor in model.parameters())


@torch.no_grad()
def _cache(model: Any, ids: torch.Tensor) -> int:
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    halves = [cache, cache.base] if hasattr(cache, "base") else [cache]
    return sum(layer.keys.nbytes + layer.values.nbytes for half in halves for layer in half.layers)


def _kept(work: str, found: dict[str, int], beside: int) -> Measurement:
    samples: Samples = {name: [float(amount)] for name, amount in found.items()}
    return Measurement(work, samples, 1 + beside / found["base"], unit="B")
