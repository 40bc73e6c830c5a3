"""Tiny random models and experts, built from configurations: what every test of a model starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from loramix import LoraConfig, get_peft_model

VOCABULARY = 96
HIDDEN = 64
SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
BLOCKS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **SPECIAL,
}
GATED: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2, **BLOCKS}


def build(kind: type[Any], **config: Any) -> Any:
    """A model of this class with random weights, the same each time, in eval mode."""
    torch.default_generator.manual_seed(0)
    return kind(kind.config_class(**config)).eval()


def llama(**changes: Any) -> PreTrainedModel:
    """Grouped-query attention, SwiGLU, RMSNorm."""
    return build(transformers.LlamaForCausalLM, **{**GATED, **changes})


def qwen3(**changes: Any) -> PreTrainedModel:
    """Normalised queries and keys."""
    return build(transformers.Qwen3ForCausalLM, **{**GATED, "head_dim": 16, **changes})


def gemma3(**changes: Any) -> PreTrainedModel:
    """A sliding window of four tokens, scaled and tied embeddings."""
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    return build(transformers.Gemma3ForCausalLM, **{**GATED, **windows, **changes})


def opt(**changes: Any) -> PreTrainedModel:
    """A decoder below the backbone, and fully connected layers that see flattened tokens."""
    return build(transformers.OPTForCausalLM, **{**BLOCKS, "ffn_dim": 128, "word_embed_proj_dim": HIDDEN, **changes})


def gpt2(**changes: Any) -> PreTrainedModel:
    """Conv1D layers, whose weights are stored as (in, out)."""
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return build(transformers.GPT2LMHeadModel, **{**SPECIAL, **sizes, **changes})


ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "opt": opt,
    "gpt2": gpt2,
}
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "gemma3": ["q_proj", "v_proj", "up_proj"],
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def tokens(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """(rows, length) random token ids, none of them special."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def save_expert(folder: Path, base: PreTrainedModel, *, seed: int = 0, **config: Any) -> str:
    """Write an expert with random, non-zero A and B for this base, which is left as it was; the folder is returned."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**settings))
    model.save_pretrained(folder)
    model.unload()
    return str(folder)


def save_experts(
    folder: Path, architecture: str, names: Sequence[str] = ("math", "code", "prose"), **config: Any
) -> dict[str, str]:
    """One expert for each name, with different seeds and ranks 2, 3, 4, …; name -> folder."""
    base = ARCHITECTURES[architecture]()
    settings = {"target_modules": TARGETS[architecture], "fan_in_fan_out": architecture == "gpt2", **config}
    return {
        name: save_expert(folder / name, base, seed=i, **{"r": 2 + i, "lora_alpha": 4 + 2 * i, **settings})
        for i, name in enumerate(names)
    }


MOE: dict[str, Any] = {**GATED, "num_experts_per_tok": 2, "tie_word_embeddings": False}


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    """Blocks of four experts with gates, stored as (N, out, in)."""
    sizes = {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32}
    return build(transformers.Qwen3MoeForCausalLM, **{**MOE, **sizes, **changes})


def mixtral(**changes: Any) -> PreTrainedModel:
    """The same blocks, whose modules had other names before transformers 5."""
    return build(transformers.MixtralForCausalLM, **{**MOE, "num_local_experts": 4, **changes})


def gpt_oss(**changes: Any) -> PreTrainedModel:
    """Blocks stored as (N, in, out), with biases, gates of its own and projections that are interleaved."""
    sizes = {"head_dim": 16, "num_local_experts": 4, "sliding_window": 4}
    model = build(transformers.GptOssForCausalLM, **{**MOE, **sizes, **changes})
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


def llama4(**changes: Any) -> PreTrainedModel:
    """Blocks that compute every token in each of their experts, beside a shared expert."""
    sizes = {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 64, "attn_temperature_tuning": False}
    config = {**MOE, **sizes, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, **changes}
    model = build(transformers.Llama4ForCausalLM, **config)
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):  # transformers starts it with zeros
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model


MOES: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}
"""Mixture-of-experts models; "gate_up_proj" and "down_proj" of "experts" are their blocks' parameters."""
