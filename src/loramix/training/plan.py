"""What a run will do and need, known before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from loramix._compat import CHECKPOINTING
from loramix.config.xlora import XLoraConfig
from loramix.experts.adapter import Adapter
from loramix.layers.inject import Site, router_sizes
from loramix.training.data import Row
from loramix.training.dataset import pieces
from loramix.training.memory import sizes_of, training_memory

_SAMPLE = 64
"""Rows that are tokenized to estimate the length of a text."""


@dataclass(frozen=True)
class Plan:
    """What a run will do and need, known before any weight is loaded.

    Attributes:
        experts: the experts' names.
        new_experts: of them, those that are new, and train.
        layers: L.
        router_parameters: the number of parameters of the router.
        base_parameters: the number of parameters of the base model.
        rows: the number of texts to train on.
        labelled: the number of them that name an expert.
        eval_rows: the number of texts to evaluate with.
        start: how the router starts.
        steps: optimizer steps, estimated from a sample where texts are longer than `max_length`; None where the
            trainer counts epochs of packed data.
        memory: bytes by purpose: weights exactly, activations as an estimate.
        cache_bytes: bytes of the scaling pass's hidden states, estimated from a sample.
    """

    experts: list[str]
    new_experts: list[str]
    layers: int
    router_parameters: int
    base_parameters: int
    rows: int
    labelled: int
    eval_rows: int
    start: str
    steps: int | None
    memory: dict[str, int]
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON's types, with the sum of the memory."""
        return {**asdict(self), "memory_total": sum(self.memory.values())}


def make_plan(
    base: PreTrainedModel,
    config: XLoraConfig,
    experts: Sequence[Adapter],
    arguments: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    sites: Sequence[Site],
    *,
    eval_rows: int,
    start: str,
) -> Plan:
    """Count and estimate.

    Args:
        base: the base model, which may be without weights (on the meta device).
        config: the mixture's, complete.
        experts: the experts.
        arguments: the trainer's.
        tokenizer: the base model's.
        rows: texts to train on.
        sites: the layers that are adapted.
        eval_rows: the number of texts to evaluate with.
        start: how the router starts.
    """
    new = config.new_experts
    weights = [module for expert in experts for module in expert.weights.values()]
    sizes = sizes_of(
        base,
        config,
        router_sizes(sites, config.hidden_size, len(experts)),
        experts=sum(module.num_parameters for module in weights),
        new=sum(m.num_parameters for e in experts if e.name in new for m in e.weights.values()),
        ranks=sum(module.rank for module in weights),
    )
    sample = [pieces(row, tokenizer, arguments.max_length) for row in rows[:_SAMPLE]]
    lengths = [len(piece) for found in sample for piece in found]
    longest = arguments.max_length if arguments.packing else max(lengths)
    batch = arguments.per_device_train_batch_size
    memory = training_memory(
        sizes,
        tokens=batch * longest,
        experts_train=config.use_trainable_adapters,
        checkpointing=getattr(arguments, CHECKPOINTING),
    )
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    if steps is None and not arguments.packing:
        count = round(len(rows) * len(lengths) / len(sample))
        a_step = batch * arguments.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
        steps = int(-(-count // a_step) * arguments.num_train_epochs)
    return Plan(
        experts=list(config.adapters),
        new_experts=list(new),
        layers=len(sites),
        router_parameters=sizes.router,
        base_parameters=sizes.base,
        rows=len(rows),
        labelled=sum(row.expert is not None for row in rows),
        eval_rows=eval_rows,
        start=start,
        steps=steps,
        memory=memory,
        cache_bytes=round(len(rows) * sum(lengths) / len(sample)) * sizes.hidden * sizes.itemsize,
    )
