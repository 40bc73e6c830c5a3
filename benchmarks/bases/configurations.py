"""Tiny random models of nearly every architecture of transformers: sizes by the names that configurations give them."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, modeling_auto

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
_TWO = {
    "indexed": ["indexed_attention"] * 2,
    "linear_attention": ["linear_attention", "full_attention"],
    "sliding": ["sliding_attention", "full_attention"],
}
_NO_SIZES = dict.fromkeys(("hidden_size", "num_layers", "num_hidden_layers"), ABSENT)
_SWIN: dict[str, Any] = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, **_NO_SIZES}
_FOUR_KEYS = {"num_key_value_heads": 4}
_ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
_TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_SHARED = {**_TEXT, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_DECODER = {**_TEXT, "model_type": "bert", "is_decoder": True, "add_cross_attention": True}
_THREE_AXES = [
    f"{kind}_text"
    for kind in (
        "qwen2_5_omni",
        "glm_ocr",
        "paddleocr_vl",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "glm4v",
        "cosmos3_edge",
    )
]
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 2]}
_PYRAMID = {
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "num_hidden_layers": ABSENT,
}
_GLM_VISION = {"depth": 2, "out_hidden_size": 64, "image_size": 16}
_QFORMER = {"encoder_hidden_size": 64}
_SEAMLESS = {
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 96,
    "num_conv_pos_embedding_groups": 4,
}
_VIBEVOICE = {"num_filters": 4, "depths": [1, 1], "downsampling_ratios": [2], "hidden_size": 16}
_DEPTHS = ("hidden_layers", "attention_heads", "key_value_heads")
OVERRIDES: dict[str, dict[str, Any]] = {  # by model type or class, where sizes must fit each other; a part by its type
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _FOUR_KEYS),
    **{kind: {"n_inner": None} for kind in ("gpt2", "gpt-sw3", "gpt_bigcode", "gptj", "codegen")},
    **{kind: {"num_hidden_layers": 4} for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")},
    **{kind: {"layer_types": ["conv", "full_attention"]} for kind in ("lfm2", "lfm2_moe", "lfm3")},
    **{kind: {"rope_parameters": {**_ROPE["full_attention"], "mrope_section": [2, 3, 3]}} for kind in _THREE_AXES},
    **dict.fromkeys(("convnext", "convnextv2"), _STAGES),
    "audioflamingo3": {"audio_config": "audioflamingo3_encoder", "text_config": "qwen2"},
    "bit": {"hidden_sizes": [32, 64], "depths": [1, 2], "num_groups": 4, "embedding_size": 32},
    "blip_2_qformer": _QFORMER,
    "blip-2": {"text_config": "opt", "num_query_tokens": 4, "image_token_index": 95},
    "blip_text_model": _QFORMER,
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 16},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "canary": {"encoder_config": "parakeet_encoder"},
    "canine": {"num_hash_buckets": 96},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "chameleon_vqgan": {"embed_dim": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 16},
    "cohere_asr": {"encoder_config": "parakeet_encoder"},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "deepseek_vl_hybrid": {"high_res_vision_config": "sam_vision_model"},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {
        "per_layer_config": {},
        "mlp_layer_types": ["dense", "dense"],
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_text": {"layer_types": _TWO["indexed"], "use_dsa": True, **_FOUR_KEYS},
    "dinat": {"num_heads": [2, 4], "depths": [1, 2], **_NO_SIZES},
    "dia": {"delay_pattern": [0, 1, 2]},
    "dia_decoder": {
        "cross_num_attention_heads": 4,
        "cross_head_dim": 16,
        "cross_num_key_value_heads": 2,
        "cross_hidden_size": 64,
    },
    "donut-swin": _SWIN,
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "emu3_vqgan": {"embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 16},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**_ROPE["full_attention"], "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [32, 32],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "evolla": {"resampler_depth": 2, "resampler_num_latents": 4, "aligner_num_add_layers": 1},
    "": {"token_dropout": False},
    "fun_asr_nano": {
        "audio_config": "fun_asr_nano_encoder",
        "text_config": "qwen3",
        "adaptor_config": {
            "hidden_size": 64,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
        },
    },
    "diffusion_gemma_text": {"top_k_experts": 2},
    "diffusion_gemma": {"vision_config": "gemma4_vision"},
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.1,
        "hidden_dim": 320,
        "image_size": 64,
        "initializer_range": 0.5,
    },
    "encoder-decoder": {"encoder": "bert", "decoder": _DECODER},
    "esm": {"esmfold_config": None, "token_dropout": False, "mask_token_id": 5},
    "esmc": _FOUR_KEYS,
    "focalnet": {**_STAGES, "embed_dim": 16, "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "gemma4_vision": {"pooling_kernel_size": 2},
    "gemma4_assistant": {"text_config": {**_SHARED, "model_type": "gemma4_text"}, "backbone_hidden_size": 64},
    "gemma4_unified_assistant": {
        "text_config": {**_SHARED, "model_type": "gemma4_unified_text"},
        "backbone_hidden_size": 64,
    },
    "gemma4_unified_vision": {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
    "glmasr": {"audio_config": "glmasr_encoder"},
    **dict.fromkeys(("glm4v_vision", "glm4v_moe_vision", "glm_ocr_vision"), _GLM_VISION),
    "glm5_next_vision": {"projection_intermediate_size": 96, **_GLM_VISION},
    "granite_speech": {"projector_config": "blip_2_qformer"},
    "granite_speech_plus": {"projector_config": "blip_2_qformer"},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE["full_attention"], "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "qk_rope_head_dim": 0,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        **_FOUR_KEYS,
    },
    "granite_docling_vision": {"out_hidden_size": 64},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1, 1, 1, 1],
        "downsample_rate": "1/2",
        "qformer_config": "blip_2_qformer",
        "vision_config": "clip_vision_model",
    },
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE["full_attention"], "mrope_section": [2, 2, 2, 2]}},
    "hunyuan_vl_vision": {"img_max_token_num": 16, "max_image_size": 16, "out_hidden_size": 64, "text_hidden_size": 64},
    "hyperclovax_vision_v2": {"vision_config": "qwen2_5_vl_vision", "text_config": "hyperclovax"},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 16},
    "inkling2_vision": {"text_hidden_size": 64, "projection_hidden_dim": 64},
    "hgnet_v2": {
        **_STAGES,
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16],
        "stage_mid_channels": [8, 8],
        "stage_out_channels": [16, 32],
        "stage_num_blocks": [1, 2],
        "stage_downsample": [False, True],
        "stage_downsample_strides": [2, 2],
        "stage_light_block": [False, True],
        "stage_kernel_size": [3, 5],
        "stage_numb_of_layers": [2, 2],
    },
    "florence2": {"text_config": "bart"},
    "florence_vision": {
        "embed_dim": [16, 32],
        "depths": [1, 1],
        "num_heads": [1, 2],
        "num_groups": [1, 2],
        "window_size": 2,
        "projection_dim": 64,
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "max_position_embeddings": 16,
    },
    "hiera": {
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "num_query_pool": 1,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False],
    },
    "instructblip": {"text_config": "opt", "num_query_tokens": 4, "image_token_index": 95},
    "instructblip_qformer": _QFORMER,
    "instructblipvideo": {"text_config": "opt", "num_query_tokens": 4, "video_token_index": 95},
    "instructblipvideo_qformer": _QFORMER,
    "janus_vision_model": {"projection_dim": 64},
    "janus_vqgan": {
        "embed_dim": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_embeddings": 16,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
    },
    "kosmos_2_text_model": {"layers": 2, "attention_heads": 4},
    "kyutai_speech_to_text": {
        "codec_config": "mimi",
        "num_codebooks": 2,
        "codebook_vocab_size": 16,
        "audio_pad_token_id": 16,
    },
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12, "input_size": 16, "max_2d_position_embeddings": 128},
    "levit": {
        "hidden_sizes": [32, 48, 64],
        "depths": [1, 1, 1],
        "num_attention_heads": [2, 3, 4],
        "key_dim": [8, 8, 8],
        "drop_path_rate": 0,
        "image_size": 64,
        "patch_size": 16,
    },
    "lilt": {"hidden_size": 96, "max_2d_position_embeddings": 128},
    "llama4_text": {"intermediate_size_mlp": 96},
    "llama4_vision_model": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mobilevitv2": {"base_attn_unit_dims": [16, 16, 16], "n_attn_blocks": [1, 1, 1], "image_size": 64, "patch_size": 2},
    "mistral_large4_text": _FOUR_KEYS,
    "molmo2_adapter": {"vision_feature_layer": [1, 0], "text_hidden_size": 64},
    "molmo2_vision": {"image_size": [16, 16]},
    "moonshine": {f"{part}_num_{what}": 2 for part in ("encoder", "decoder") for what in _DEPTHS},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"sliding_windows": [[4, 2], [4, 2]], **_FOUR_KEYS},
    "mimi": {"num_filters": 4, "codebook_size": 16, "upsample_groups": 64, "num_quantizers": 2},
    "muse_spark": {"out_hidden_size": 64, "projector_hidden_size": 64},
    "muse_spark_audio": {
        "patch_sizes": [16, 6],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "out_hidden_size": 64,
    },
    "muse_spark_text": {"moe_hidden_size": 64},
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 64},
    "modernvbert": {"text_config": "modernbert"},
    "musicflamingo": {"audio_config": "audioflamingo3_encoder", "text_config": "qwen2"},
    **{kind: {"num_codebooks": 1} for kind in ("musicgen_decoder", "musicgen_melody_decoder")},
    "nemo_speechlm": {"text_config": "nemotron_h"},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 95},
    "nemotron_h_omni": {
        "vision_hidden_size": 64,
        "projector_hidden_size": 64,
        "vision_config": "radio",
        "text_config": "nemotron_h",
    },
    "paligemma": {"text_config": "gemma", "projection_dim": 64},
    "perception_lm": {"vision_config": "timm_wrapper"},
    "perceiver": {
        "d_latents": 64,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 32,
    },
    "pi0": {"vlm_config": "paligemma", "dit_config": "gemma"},
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "pvt": {"image_size": 32, **_PYRAMID, "sequence_reduction_ratios": [2, 2, 1, 1]},
    "pvt_v2": {**_PYRAMID, "sr_ratios": [2, 2, 1, 1]},
    **{kind: {"vision_start_token_id": 94} for kind in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "qwen2_audio": {"audio_config": "qwen2_audio_encoder", "text_config": "qwen2"},
    "qwen4_exp_text": {
        "layer_types": _TWO["linear_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 128,
        "indexer_compress_ratio": 4,
    },
    "qwen3_asr": {"audio_config": "qwen3_asr_encoder", "text_config": "qwen3"},
    "ReformerForMaskedLM": {"is_decoder": False},
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 16},
    "regnet": {**_STAGES, "groups_width": 8, "embedding_size": 16},
    "resnet": {**_STAGES, "embedding_size": 16},
    "roc_bert": {
        "pronunciation_vocab_size": 96,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": 96,
        "shape_embed_dim": 16,
    },
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), _SEAMLESS),
    "segformer": {**_PYRAMID, "sr_ratios": [2, 2, 1, 1]},
    "shieldgemma2": {"text_config": "gemma3_text", "yes_token_index": 5, "no_token_index": 6},
    "speech-encoder-decoder": {"encoder": "wav2vec2", "decoder": _DECODER},
    "speecht5": {"conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 16},
    "t5": {"decoder_start_token_id": 1},
    "textnet": {
        "stem_out_channels": 16,
        "hidden_sizes": [16, 16, 32],
        "conv_layer_kernel_sizes": [[[3, 3], [3, 1]], [[3, 3]]],
        "conv_layer_strides": [[1, 2], [2]],
    },
    "ultravbert": {"text_config": "ultrabert"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": _DECODER},
    "voxtral": {"audio_config": "voxtral_encoder", "text_config": "llama"},
    **dict.fromkeys(("vibevoice_acoustic_tokenizer_encoder", "vibevoice_acoustic_tokenizer"), _VIBEVOICE),
    "vibevoice": {
        "text_config": "qwen2",
        "semantic_model_config": "vibevoice_acoustic_tokenizer_encoder",
        "audio_config": "vibevoice_acoustic_tokenizer",
    },
    "vibevoice_asr": {
        "text_config": "qwen2",
        "semantic_tokenizer_encoder_config": "vibevoice_acoustic_tokenizer_encoder",
        "acoustic_tokenizer_encoder_config": "vibevoice_acoustic_tokenizer_encoder",
    },
    "voxtral_realtime": {"audio_config": "voxtral_realtime_encoder", "text_config": "voxtral_realtime_text"},
    "wav2vec2": {"conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 16},
    "xmod": {"default_language": "en_XX"},
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


def _random(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1))


def _numbers(*sizes: int) -> Tensor:
    return torch.arange(4, 4 + math.prod(sizes)).reshape(sizes) % 10 + 4


_IMAGES = {"pixel_values": _random(2, 3, 16, 16)}
_SOUND = {"input_values": _random(2, 4000)}
INPUTS: dict[str, dict[str, Tensor]] = {  # by model type: what a forward takes beside a text, or in its place
    **dict.fromkeys(("blip", "blip-2", "idefics", "kosmos-2", "pp_formulanet"), _IMAGES),
    "canary": {"input_features": _random(2, 64, 80)},
    "cohere_asr": {"input_features": _random(2, 64, 80)},
    "dia": {"decoder_input_ids": _numbers(2, 5, 3)},
    "idefics": {"pixel_values": _random(2, 1, 3, 16, 16), "image_attention_mask": torch.ones(2, 9, 1)},
    "instructblip": {**_IMAGES, "qformer_input_ids": _numbers(2, 6)},
    "instructblipvideo": {"pixel_values": _random(2, 2, 3, 16, 16), "qformer_input_ids": _numbers(2, 6)},
    "kosmos-2": {"image_embeds": _random(2, 4, 64), "image_embeds_position_mask": torch.arange(9).expand(2, 9) < 4},
    "kyutai_speech_to_text": {"input_ids": _numbers(2, 9, 3)},
    "voxtral_realtime": {"input_features": _random(2, 128, 72)},
    "moonshine": _SOUND,
    "moonshine_streaming": _SOUND,
    "pix2struct": {"flattened_patches": torch.cat([_numbers(2, 11, 2), _random(2, 11, 768)], -1)},
    "seamless_m4t": {"input_features": _random(2, 64, 160)},
    "seamless_m4t_v2": {"input_features": _random(2, 64, 160)},
    "siglip2": {
        "pixel_values": _random(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "speech-encoder-decoder": {"input_values": _random(2, 400)},
    "speecht5": {"input_values": _random(2, 400)},
    "udop": {"bbox": torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(1))},
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
    config = _tiny(kind.config_class, OVERRIDES.get(name, {}))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind(config).parameters())
    if parameters > _LARGEST:
        raise ValueError(f"the smallest {name} known here has {parameters:,} parameters")
    torch.manual_seed(0)
    return kind(config).eval()


def _tiny(kind: type[PreTrainedConfig], changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    model_type = getattr(kind, "model_type", "")
    known = _fields(kind)
    values = {name: size for name, size in SIZES.items() if name in known}
    values |= {name: 0.0 for name in known if NO_DROPOUT.fullmatch(name)}
    for alias, name in (getattr(kind, "attribute_map", None) or {}).items():
        if alias in values and (name in values or alias not in getattr(kind, "__annotations__", {})):
            del values[alias]
        if name in known and name not in values and alias in SIZES:
            values[name] = SIZES[alias]
    values |= OVERRIDES.get(model_type, {}) | (changes or {})
    values = {name: value for name, value in values.items() if value is not ABSENT}
    if kind.__name__ == "MptAttentionConfig":
        values["attn_pdrop"] = 0
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        if isinstance(values.get(name), str):
            values[name] = _tiny(CONFIG_MAPPING[values[name]]).to_dict()
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
