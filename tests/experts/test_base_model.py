"""What is read of a base model's configuration, whatever transformers calls it there."""

from __future__ import annotations

import pytest
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    T5Config,
)

from loramix.experts.base_model import blocks_of, identifier_of, positions_of, vocabulary_of
from loramix.experts.dry_run import hidden_size_of
from support.checkpoints import HIDDEN, tiny_gpt2, tiny_llama

CONFIGS = {
    "llama": LlamaConfig(vocab_size=24, num_hidden_layers=3, max_position_embeddings=40),
    "gpt2": GPT2Config(vocab_size=24, n_layer=3, n_positions=40),
    "the language model of several": LlavaConfig(
        text_config=LlamaConfig(vocab_size=24, num_hidden_layers=3, max_position_embeddings=40)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes(name: str) -> None:
    config = CONFIGS[name]
    assert (vocabulary_of(config), blocks_of(config), positions_of(config)) == (24, 3, 40)


@pytest.mark.parametrize("config", [T5Config(), PreTrainedConfig()], ids=["t5", "bare"])
def test_a_model_without_a_longest_text(config: PreTrainedConfig) -> None:
    assert positions_of(config) is None


def test_the_hidden_size_is_that_of_the_last_hidden_state() -> None:
    assert hidden_size_of(tiny_llama()) == hidden_size_of(tiny_gpt2()) == HIDDEN
    assert hidden_size_of(tiny_llama().model) == hidden_size_of(tiny_gpt2().transformer) == HIDDEN
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24}
    projected = OPTForCausalLM(OPTConfig(word_embed_proj_dim=8, **sizes))
    assert hidden_size_of(projected) == hidden_size_of(projected.model) == 8


def test_where_a_model_came_from() -> None:
    model = tiny_llama()
    assert identifier_of(model) is None
    model.config.name_or_path = "user/base"
    assert identifier_of(model) == "user/base"
