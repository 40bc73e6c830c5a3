"""Tiny random models of nearly every architecture of transformers: sizes by the names that configurations give them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 96
_ALIKE: dict[int, str] = {  # a size, and the names of all fields that get it
    64: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim attention_hidden_size "
    "lru_width embedding_dim decoder_hidden_size",
    96: "intermediate_size ffn_dim d_ff d_inner n_inner hidden_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff "
    "ffn_hidden_size feed_forward_size vocab_size vocab_size_per_layer_input",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_topk num_experts_per_token moe_k "
    "linear_num_key_heads o_groups index_n_heads n_mamba_heads eos_token_id sep_token_id type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts mamba_d_conv linear_num_value_heads linear_conv_kernel_dim sliding_window "
    "attention_window_size sliding_window_size local_attention_window patch_size block_size",
    16: "head_dim d_kv dim_head global_head_dim attention_head_size q_lora_rank kv_lora_rank v_head_dim qk_head_dim "
    "index_head_dim o_lora_rank mamba_d_state mamba_d_head ssm_state_size mamba_head_dim mamba_headdim "
    "linear_key_head_dim linear_value_head_dim image_size",
    128: "index_topk max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "max_source_positions",
    1: "n_shared_experts n_group topk_group first_k_dense_replace moe_layer_start_index moe_num_shared_experts "
    "num_shared_experts mamba_n_groups n_groups mamba_ngroups bos_token_id decoder_start_token_id cls_token_id "
    "num_random_blocks",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size",
    8: "qk_rope_head_dim qk_nope_head_dim state_size mamba_n_heads mamba_chunk_size mamba_num_heads chunk_size "
    "mamba_dt_rank time_step_rank hidden_size_per_layer_input laurel_rank rotary_dim",
    0: "num_nextn_predict_layers num_kv_shared_layers pad_token_id",
    3: "num_channels num_labels",
}
SIZES: dict[str, Any] = {name: size for size, names in _ALIKE.items() for name in names.split()} | {"mamba_expand": 2}
NO_DROPOUT = re.compile(r".*(dropout|drop_path|layerdrop|_pdrop|jitter_noise).*")
ABSENT: Any = object()
_LARGEST = 10**7
_PARTS: dict[str, dict[str, Any]] = {  # for a part that may be any model
    "text": {"model_type": "llama", "pad_token_id": 0},
    "vision": {"model_type": "siglip_vision_model", "hidden_size": 32, "image_size": 16, "patch_size": 4},
}
_TWO = {"linear_attention": ["linear_attention", "full_attention"], "sliding": ["sliding_attention", "full_attention"]}
_NO_SIZES = dict.fromkeys(("hidden_size", "num_layers", "num_hidden_layers"), ABSENT)
_SWIN: dict[str, Any] = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, **_NO_SIZES}
_FOUR_KEYS = {"num_key_value_heads": 4}
_ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_THREE_AXES = [f"{kind}_text" for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe")]
OVERRIDES: dict[str, dict[str, Any]] = {  # by model type, where sizes must fit each other
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), _FOUR_KEYS),
    **{kind: {"n_inner": None} for kind in ("gpt2", "gpt-sw3", "gpt_bigcode", "gptj", "codegen")},
    **{kind: {"num_hidden_layers": 4} for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")},
    **{kind: {"layer_types": ["conv", "full_attention"]} for kind in ("lfm2", "lfm2_moe", "lfm3")},
    **{kind: {"rope_parameters": {**_ROPE["full_attention"], "mrope_section": [2, 3, 3]}} for kind in _THREE_AXES},
    "bailing_hybrid": {"layer_group_size": 2, **_FOUR_KEYS},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": _TWO["sliding"], "rope_parameters": _ROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon": {"num_kv_heads": 4, "ffn_hidden_size": 96},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "fuyu": {"text_config": {**_TEXT, "model_type": "persimmon", **_FOUR_KEYS, "pad_token_id": 0}},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"layer_types": _TWO["sliding"], "query_pre_attn_scalar": 16},
    "glm_moe_dsa": _FOUR_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {
        "layer_types": _TWO["linear_attention"],
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        **_FOUR_KEYS,
    },
    "longcat_flash": {"head_dim": 8, "num_layers": 2, "zero_expert_num": 2, **_FOUR_KEYS},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "moshi": {"audio_vocab_size": 32},
    "mpt": {"expansion_ratio": 2, "attn_pdrop": 0, "resid_pdrop": 0},
    "phi3": {"sliding_window": None},
    "qwen4_exp_text": {"layer_types": _TWO["linear_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": ABSENT,
        "axial_pos_embds": False,
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    "swin": _SWIN,
    "swinv2": {**_SWIN, "pretrained_window_sizes": [0, 0]},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "num_blocks": 2},
    "zamba": {
        "num_hidden_layers": 5,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}
MAPPINGS: dict[str, dict[str, Any]] = {
    "causal": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": dict(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "classification": dict(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "seq2seq": dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "speech": dict(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    "image": dict(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "image and text": dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}


def classes(mapping: str) -> dict[str, str]:
    """Model type -> class, of one of the mappings of transformers' auto classes."""
    found = {kind: name if isinstance(name, str) else name[0] for kind, name in MAPPINGS[mapping].items()}
    return {kind: name for kind, name in found.items() if hasattr(transformers, name)}


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of this class, in eval mode, the same each time.

    Raises:
        ValueError: its configuration is not known well enough to make a small one.
        Exception: whatever the class raises for sizes that do not fit each other.
    """
    kind: Any = getattr(transformers, name)
    config = _tiny(kind.config_class)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind(config).parameters())
    if parameters > _LARGEST:
        raise ValueError(f"the smallest {name} known here has {parameters:,} parameters")
    torch.manual_seed(0)
    return kind(config).eval()


def _tiny(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    model_type = getattr(kind, "model_type", "")
    known = _fields(kind)
    values = {name: size for name, size in SIZES.items() if name in known}
    values |= {name: 0.0 for name in known if NO_DROPOUT.fullmatch(name)}
    for alias, name in (getattr(kind, "attribute_map", None) or {}).items():
        if alias in values and (name in values or alias not in getattr(kind, "__annotations__", {})):
            del values[alias]
        if name in known and name not in values and alias in SIZES:
            values[name] = SIZES[alias]
    values |= OVERRIDES.get(model_type, {})
    values = {name: value for name, value in values.items() if value is not ABSENT}
    if kind.__name__ == "MptAttentionConfig":
        values["attn_pdrop"] = 0
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if name in values:
            continue
        if part.__name__ != "AutoConfig":
            values[name] = _tiny(part).to_dict()
        elif name.removesuffix("_config") in _PARTS:
            values[name] = _TEXT | _PARTS[name.removesuffix("_config")]
    return kind(**values)


def _fields(kind: type[PreTrainedConfig]) -> set[str]:
    names: set[str] = set()
    for parent in kind.__mro__:
        names |= set(getattr(parent, "__annotations__", {}))
    for parent in kind.__mro__:
        if parent is PreTrainedConfig:
            break
        names |= set(inspect.signature(parent.__init__).parameters)
    return names
