"""Which modules an expert adapts, compared with PEFT, and which features are refused."""

from __future__ import annotations

import warnings

import pytest

from loramix.config.lora import LoraConfig
from loramix.errors import UnsupportedAdapterError
from loramix.experts.features import refuse_unsupported, unsupported_features
from loramix.experts.targets import is_target

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

PATHS = [
    "q_proj",
    "xq_proj",
    "lm_head",
    "model.embed_tokens",
    "transformer.h.0.attn.c_attn",
    *(f"model.layers.{i}.{module}" for i in (0, 1, 10) for module in ("self_attn.q_proj", "mlp.experts.1.up")),
    "layers.1.q_proj",
    "model.vision.layers.1.q_proj",
    "model.layers.1.q_proj.0.inner",
]
CONFIGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head", "up"], "exclude_modules": ["0.self_attn.q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": r".*\.(q_proj|c_attn)"},
    {"target_modules": r"q_proj"},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": [0, 10]},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "up"], "layers_to_transform": [1], "layers_pattern": ["h", "experts"]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0], "layers_pattern": ["h"]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": []},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_targets_are_peft_s(settings):
    ours, theirs = LoraConfig(**settings), peft.LoraConfig(**settings)
    expected = [path for path in PATHS if check_target_module_exists(theirs, path)]
    assert [path for path in PATHS if is_target(ours, path)] == expected


def test_the_cases_above_tell_rules_apart():
    chosen = {tuple(path for path in PATHS if is_target(LoraConfig(**settings), path)) for settings in CONFIGS}
    assert len(chosen) >= len(CONFIGS) - 2


def test_without_targets_nothing_is_adapted():
    assert not any(is_target(LoraConfig(), path) for path in PATHS)


REFUSED = {
    "layer_replication": [(0, 1)],
    "megatron_config": {"x": 1},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 0.1},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "ensure_weight_tying": True,
    "runtime_config": {"ephemeral_gpu_offload": True},
}
CARRIED = {
    "target_parameters": ["experts.gate_up_proj"],
    "init_lora_weights": "eva",
    "eva_config": {"rho": 2.0},
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {"scale": "stable"},
    "corda_config": {"verbose": True},
    "lora_dropout": 0.5,
    "use_dora": True,
    "lora_bias": True,
    "use_rslora": True,
    "fan_in_fan_out": True,
    "rank_pattern": {"q": 2},
    "alpha_pattern": {"q": 2},
    "exclude_modules": ["q"],
    "layers_to_transform": [0],
    "modules_to_save": ["lm_head"],
    "qalora_group_size": 4,
    "trainable_token_indices": [1],
    "bias": "lora_only",
}


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_a_feature_without_meaning_here_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedAdapterError) as caught:
        refuse_unsupported(LoraConfig(**{field: value}), "math")
    assert f"{field}={value!r}" in caught.value.received
    assert "'math'" in caught.value.received
    assert "LoRA" in caught.value.rule
    assert "Leave this expert out" in caught.value.remedy


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "OLoRA"])
def test_an_initialisation_that_changes_the_base_is_refused(init):
    with pytest.raises(UnsupportedAdapterError, match=f"init_lora_weights='{init}'") as caught:
        refuse_unsupported(LoraConfig(init_lora_weights=init), "math")
    assert "path_initial_model_for_weight_conversion" in caught.value.remedy


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_leave_plain_lora(init):
    assert unsupported_features(LoraConfig(init_lora_weights=init)) == []


@pytest.mark.parametrize(("field", "value"), CARRIED.items())
def test_other_fields_are_carried(field, value):
    refuse_unsupported(LoraConfig(**{field: value}), "math")


def test_all_features_are_named_at_once():
    config = LoraConfig(alora_invocation_tokens=[1], use_qalora=True)
    found = unsupported_features(config)
    assert [feature.partition(" (")[0] for feature in found] == ["alora_invocation_tokens=[1]", "use_qalora=True"]
    assert all(feature.endswith(")") for feature in found)
