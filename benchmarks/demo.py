"""Lockstep on the demo mixture, whose experts are really trained: one prompt for each domain.

In float32 the tokens are those of two passes; in bfloat16, `facts` says how many they have in common before they part.
"""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.generate import in_common
from benchmarks.models import Models
from loramix.demo import bundle
from loramix.demo.run import PROMPTS
from loramix.timing import Contender, Measurement, interleave

LENGTH = 128


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Greedy tokens after each prompt; base is the demo's base model."""
    model, tokenizer = bundle.load()
    base, new = bundle.base().eval(), LENGTH if models.size.hidden >= 512 else 8
    half = copy.deepcopy(model).bfloat16()
    found: list[Measurement] = []
    for domain, prompt in PROMPTS.items():
        inputs = dict(tokenizer(prompt, return_tensors="pt"))

        def call(net: Any, inputs: dict[str, Any] = inputs, **how: Any) -> Any:
            return net.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **how)

        contenders = [
            Contender("base", lambda call=call: call(base)),
            Contender("two passes", lambda call=call: call(model, lockstep=False)),
            Contender("loramix", lambda call=call: call(model)),
        ]
        times = interleave(contenders, rounds, warm_ups=2)
        start = inputs["input_ids"].shape[1]
        together = call(model, lockstep=True)[0, start:]
        report: Any = model.lockstep_report
        apart, chosen = (call(model, lockstep=how)[0, start:] for how in (False, None))
        halves = [call(half, lockstep=how)[0, start:] for how in (False, True)]
        facts = {
            "new": new,
            "bfloat16": in_common(*halves),
            "tokens in common": min(in_common(apart, together), in_common(apart, chosen)),
            "accepted": round(report.accepted, 3),
            "forwards per token": round(report.forwards_per_token, 3),
            "against": "two passes",
        }
        found.append(Measurement(f"{domain}: generate {new} tokens", times, facts=facts))
    return found
