"""The memory that a plan tells: against real models, and the page of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from docs import make_memory
from loramix import XLoraConfig, XLoraLayer, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.routers import RouterSizes
from loramix.timing import peak_bytes
from loramix.training.memory import sizes_of, training_memory
from support.tiny import save_expert
from support.versions import needs_transformers

ACTIVATIONS = "activations of one batch (estimate)"


def wide() -> LlamaForCausalLM:
    """In proportion a Llama of a few billion parameters."""
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=6, pad_token_id=0, **sizes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_near_what_a_step_holds(checkpointing: bool, tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "one", wide(), target_modules="all-linear")
    config = XLoraConfig(hidden_size=128, adapters={"one": folder}, xlora_depth=1)
    model = get_peft_model(wide(), config).train()
    if checkpointing:
        enable_checkpointing(model, use_reentrant=False)
    layers = [module for module in model.modules() if isinstance(module, XLoraLayer)]
    experts = sum(p.numel() for layer in layers for p in layer.stack.parameters())
    ranks = sum(layer.stack.rank for layer in layers)
    sizes = sizes_of(wide(), config, RouterSizes(128, len(layers), 1), experts=experts, ranks=ranks)
    assert sizes.router == sum(p.numel() for p in model.internal_xlora_classifier.parameters())
    assert sizes.base + sizes.router + experts == sum(p.numel() for p in model.parameters())
    ids = torch.randint(512, (2, 256))
    told = training_memory(sizes, tokens=ids.numel(), checkpointing=checkpointing)[ACTIVATIONS]
    held = peak_bytes(lambda: model(ids, labels=ids).loss.backward())
    assert 0.9 < told / held < 2


def test_shards_divide_parameters_and_nothing_else() -> None:
    sizes = make_memory.sizes("8B")
    one, eighth = (training_memory(sizes, tokens=1000, shards=shards) for shards in (1, 8))
    assert sizes.base == 8_030_261_248
    assert eighth["base model"] * 8 == one["base model"]
    assert eighth[ACTIVATIONS] == one[ACTIVATIONS]
    assert training_memory(sizes, tokens=1, experts_train=True)["experts"] == 8 * one["experts"]


@needs_transformers(5, 20, "the page is made with a newer one")
def test_the_table_is_that_of_the_page() -> None:
    assert make_memory.table() in make_memory.PAGE.read_text(encoding="utf-8"), "run `make docs`"
