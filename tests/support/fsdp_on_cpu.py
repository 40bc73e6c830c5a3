"""`loramix …` where accelerate takes the CPU for an accelerator: it shards on those only, though gloo can.

Prints, for a test to look at, how the model was prepared for its first step.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import state
from torch.distributed.tensor import DTensor
from transformers import Trainer

from loramix.cli import main

start = state.PartialState.__init__
step = Trainer.training_step
shown: list[str] = []


def on_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
    start(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == state.DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU


def told(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    if not shown:
        sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
        shown.append(f"{self.accelerator.distributed_type} sharded={sharded}")
        print(*shown, file=sys.stderr, flush=True)
    return step(self, model, *args, **kwargs)


state.PartialState.__init__ = on_accelerators
Trainer.training_step = told  # type: ignore[method-assign]
main()
