"""Every call of PEFT's models works here, or raises an error that names another way."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loramix
from loramix import PeftModel, XLoraConfig, get_peft_model
from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.model.peft_names import REFUSED
from support.disk import WEIGHTS
from support.mixtures import logits_of, mixture
from support.peft_side import PEFT_WARNINGS
from support.tiny import ARCHITECTURES, llama, tokens

Experts = Callable[[str], dict[str, str]]
REPLACED = "experts, which were replaced"
pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)


def names_of_pefts(*, outer: bool) -> set[str]:
    """Those of the model that `base_model` is, and of the outer one."""
    import peft

    kinds = [peft.tuners.xlora.XLoraModel, peft.tuners.lora.LoraModel, *([peft.PeftModelForCausalLM] if outer else [])]
    return {name for kind in kinds for name in dir(kind) if not name.startswith("_") and not hasattr(nn.Module, name)}


CLASS_FACTS = {"prefix", "target_module_mapping", "tuner_layer_cls", "uses_shared_state"}
"""Attributes of PEFT's classes that describe a kind of adapter."""


def test_the_model_has_every_name_of_pefts(experts: Experts) -> None:
    model = mixture(experts("llama"))
    assert {name for name in names_of_pefts(outer=True) - CLASS_FACTS if not hasattr(model, name)} == set()
    assert {name for name in names_of_pefts(outer=False) - CLASS_FACTS if not hasattr(model.base_model, name)} == set()


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_fixed_experts_do_not_allow(name: str, experts: Experts) -> None:
    model = mixture(experts("llama"))
    for owner in (model, model.base_model):
        with pytest.raises(UnsupportedOperationError, match=rf"{name}\(\)") as caught:
            getattr(owner, name)("a", [0.5], key="b")
        assert REFUSED[name] in caught.value.remedy


def test_attributes(experts: Experts) -> None:
    model = mixture(experts("llama"))
    assert model.base_model_torch_dtype == torch.float32
    assert model.modules_to_save is None
    assert not model.special_peft_forward_args
    assert model.has_active_enabled_adapter
    model.disable_adapter_layers()
    assert not model.has_active_enabled_adapter


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_model_is_reached_through_base_model(architecture: str, experts: Experts) -> None:
    model = mixture(experts(architecture), architecture)
    assert model.base_model.model is model
    assert model.base_model.internal_xlora_classifier is model.internal_xlora_classifier
    assert model.base_model.peft_config is not None
    model.base_model.set_topk_lora(1)
    assert model.peft_config["default"].top_k_lora == 1
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert other.base_model.model is other
        assert torch.equal(logits_of(other), logits_of(model))
    base = model.unload()
    assert not hasattr(base.base_model, "model")
    assert not hasattr(base.base_model, "peft_config")


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma3"])
def test_transformers_finds_a_mixtures_parts_as_the_base_models(architecture: str, experts: Experts) -> None:
    model, base = mixture(experts(architecture), architecture), ARCHITECTURES[architecture]()
    assert type(model.get_decoder()).__name__ == type(base.get_decoder()).__name__
    assert model.base_model.base_model is model.base_model
    assert model.base_model.get_input_embeddings() is model.get_input_embeddings()


def test_a_part_is_not_saved_without_its_router(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    for call in (model.base_model.save_pretrained, model.base_model.push_to_hub):
        with pytest.raises(UnsupportedOperationError, match="saved from the whole model"):
            call(str(tmp_path / "part"))
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_for_each_text_is_refused(alone: bool, experts: Experts) -> None:
    model: Any = PeftModel.from_pretrained(llama(), experts("llama")["math"]) if alone else mixture(experts("llama"))
    for call in (model, model.generate):
        with pytest.raises(UnsupportedOperationError, match=r"adapter_names=\['math'"):
            call(tokens(), adapter_names=["math", "code"])


TAKEN: dict[str, Any] = {
    "torch_device": "cpu",
    "device_map": "auto",
    "max_memory": None,
    "offload_dir": "x",
    "offload_folder": "x",
    "dtype": torch.float16,
    "torch_dtype": torch.float16,
    "low_cpu_mem_usage": True,
    "use_safetensors": True,
    "trust_remote_code": True,
    "use_auth_token": None,
    "proxies": None,
    "resume_download": None,
    "repo_type": "model",
    "ignore_mismatched_sizes": False,
    "is_trainable": False,
    "adapter_name": "x",
}


def test_arguments_that_mean_nothing_here_are_taken(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    model.save_pretrained(tmp_path)
    for folder, expected in ((str(tmp_path), logits_of(model)), (experts("llama")["math"], None)):
        plain = logits_of(PeftModel.from_pretrained(llama(), folder))
        assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), folder, **TAKEN)), plain)
        assert expected is None or torch.equal(plain, expected)


def test_keys_are_mapped_as_by_peft(experts: Experts, tmp_path: Path) -> None:
    folder = experts("llama")["math"]
    expected = logits_of(PeftModel.from_pretrained(llama(), folder))
    tensors = load_file(Path(folder) / WEIGHTS)
    shutil.copytree(folder, tmp_path / "other")
    save_file(
        {k.replace("mlp", "ffn").replace("self_attn", "att"): t for k, t in tensors.items()},
        tmp_path / "other" / WEIGHTS,
    )
    mapping = {r"\.ffn\.": ".mlp.", "att": "self_attn"}
    found = PeftModel.from_pretrained(llama(), str(tmp_path / "other"), key_mapping=mapping)
    assert torch.equal(logits_of(found), expected)
    same = PeftModel.from_pretrained(llama(), folder, key_mapping={"x": "y"})
    assert torch.equal(logits_of(same), expected)
    with pytest.raises(ConfigurationError, match="regular expressions"):
        PeftModel.from_pretrained(llama(), folder, key_mapping={"(": "x"})


@pytest.mark.parametrize("argument", [{"ignore_mismatched_sizes": True}, {"repo_type": "dataset"}, {"no_such": 1}])
def test_arguments_that_would_mean_something_are_refused(argument: dict[str, Any], experts: Experts) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(argument))):
        PeftModel.from_pretrained(llama(), experts("llama")["math"], **argument)


def test_pefts_configurations_are_read_by_their_fields(experts: Experts, tmp_path: Path) -> None:
    import peft

    adapters: dict[str, str] = experts("llama")
    fields: dict[str, Any] = {"adapters": adapters, "xlora_depth": 2, "xlora_size": 16, "top_k_lora": 2}
    models: list[Any] = []
    for kind in (peft.XLoraConfig, XLoraConfig):
        torch.manual_seed(0)
        models.append(get_peft_model(llama(), kind(hidden_size=64, **fields)).eval())
    found, expected = models
    written_by = {"peft_version": peft.__version__}
    assert found.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict() | written_by
    assert torch.equal(logits_of(found), logits_of(expected))
    theirs: Any = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    expert: Any = get_peft_model(llama(), theirs)
    assert expert.peft_config["default"].r == 3
    assert set(expert.adapted_modules) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    expected.save_pretrained(tmp_path)
    changed: Any = peft.XLoraConfig.from_pretrained(tmp_path)
    changed.top_k_lora = 1
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path, config=changed)
    assert loaded.peft_config["default"].top_k_lora == 1


@pytest.mark.parametrize("other", ["PrefixTuningConfig", "IA3Config"])
def test_other_configurations_of_pefts_are_refused(other: str) -> None:
    import peft

    theirs: dict[str, Any] = {"num_virtual_tokens": 2} if other.startswith("P") else {"target_modules": ["q_proj"]}
    with pytest.raises(loramix.UnsupportedAdapterError, match="peft_type"):
        get_peft_model(llama(), getattr(peft, other)(task_type="CAUSAL_LM", **theirs))


def test_a_base_model_that_carries_a_mixture_is_loaded_again(experts: Experts, tmp_path: Path) -> None:
    """PEFT's users keep the base model's object."""
    base = llama()
    model = mixture(experts("llama"), base=base)
    model.save_pretrained(tmp_path)
    expected = logits_of(model)
    with pytest.warns(UserWarning, match=REPLACED):
        again: Any = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits_of(again), expected)
    with pytest.warns(UserWarning, match=REPLACED):
        one: Any = PeftModel.from_pretrained(base, experts("llama")["math"])
    assert not isinstance(one, loramix.XLoraModel)
    with pytest.warns(UserWarning, match=REPLACED):
        mixture(experts("llama"), base=base)
    plain: Any = base
    assert torch.equal(plain.unload()(tokens()).logits, llama()(tokens()).logits)
