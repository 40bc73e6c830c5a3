"""`torch.compile(fullgraph=True)`: a forward over the prompt, and one token after it with a static cache.

PEFT's forward sets hooks, which cannot be traced: it takes no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from transformers import StaticCache

from benchmarks.models import Models
from loramix.timing import Contender, Measurement, interleave

WARM_UPS = 3
Step = Callable[[], object]


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Two measurements in steady state; `facts` has the seconds of each first call, which compiles."""
    size, weights = models.size, models.weights
    slots = size.prompt + rounds + WARM_UPS + 1
    limit = weights.limit(1, 1, size.attention(slots))
    return [
        _measure(models, rounds, f"forward of {size.prompt} tokens", _forward, weights.forward_limit()),
        _measure(models, rounds, f"one token after {size.prompt}, {slots} slots", _decode(slots), limit),
    ]


def _measure(models: Models, rounds: int, work: str, make: Any, limit: float) -> Measurement:
    # Nothing is compiled in the tests: what they look at is that it traces into one graph.
    backend = "inductor" if models.size.hidden >= 512 else "eager"
    cache: AbstractContextManager[Any] = fresh_cache() if backend == "inductor" else nullcontext()
    contenders: list[Contender] = []
    seconds: dict[str, float] = {}
    torch._dynamo.reset()
    with torch.no_grad(), cache:
        for name, model in (("base", models.base), ("loramix", models.loramix)):
            compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
            step = make(compiled, model, models.prompt)
            start = time.perf_counter()
            step()
            seconds[name] = round(time.perf_counter() - start, 1)
            eager = make(model, model, models.prompt)
            contenders += [Contender(name, step), Contender(f"{name}, eager", eager)]
        times = interleave(contenders, rounds, warm_ups=WARM_UPS)
    torch._dynamo.reset()
    return Measurement(work, times, limit, facts={"compile seconds": seconds})


def _forward(call: Any, _: Any, prompt: torch.Tensor) -> Step:
    return lambda: call(input_ids=prompt, use_cache=False)


def _decode(slots: int) -> Callable[[Any, Any, torch.Tensor], Step]:
    def make(call: Any, model: Any, prompt: torch.Tensor) -> Step:
        cache = StaticCache(config=model.config, max_cache_len=slots)
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        token = prompt[:, -1:]
        return lambda: call(input_ids=token, past_key_values=cache, use_cache=True)

    return make
