"""Puts the memory table into docs/distributed.md: `make docs`; a test holds the page against it.

The base models are built without weights, from the published sizes of the Llama 3 family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loramix import XLoraConfig
from loramix.routers import RouterSizes
from loramix.training.memory import Sizes, sizes_of, training_memory

PAGE = Path(__file__).with_name("distributed.md")
BEGIN, END = "<!-- memory -->\n", "<!-- /memory -->\n"
EXPERTS, RANK, TOKENS, SHARDS = 8, 16, 4096, 8
MODELS: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def sizes(name: str) -> Sizes:
    """A model of the family, and eight experts of rank 16 on all linear layers of its blocks."""
    tied = name in ("1B", "3B")
    settings = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": tied}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**settings, **MODELS[name])).to(torch.bfloat16)
    linears = [m for m in base.model.modules() if isinstance(m, nn.Linear)]
    config = XLoraConfig(
        hidden_size=base.config.hidden_size,
        adapters={str(number): "" for number in range(EXPERTS)},
        xlora_depth=2,
        layerwise_scalings=True,
    )
    return sizes_of(
        base,
        config,
        RouterSizes(base.config.hidden_size, len(linears), EXPERTS),
        experts=EXPERTS * RANK * sum(m.in_features + m.out_features for m in linears),
        ranks=EXPERTS * RANK * len(linears),
    )


def table() -> str:
    """One row for each model."""
    rows = [
        "| base model | its weights | experts | router | activations | recomputed | DDP, a rank | FSDP2, one of 8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        found = sizes(name)
        plain = training_memory(found, tokens=TOKENS)
        ddp = training_memory(found, tokens=TOKENS, checkpointing=True)
        fsdp = training_memory(found, tokens=TOKENS, checkpointing=True, shards=SHARDS)
        base, experts, router, _ = plain.values()
        activations, recomputed = (tuple(memory.values())[3] for memory in (plain, ddp))
        cells = (base, experts, router, activations, recomputed, sum(ddp.values()), sum(fsdp.values()))
        rows.append(f"| {name} | {' | '.join(f'{size / 1e9:.1f}' for size in cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
