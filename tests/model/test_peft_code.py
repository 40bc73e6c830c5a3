"""Code written for PEFT's X-LoRA runs after changing the import: one script, run with both packages."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

import loramix
from loramix import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    ConfigurationError,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    XLoraClassifier,
    XLoraConfig,
    XLoraLayer,
    XLoraModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from loramix._compat import is_checkpointing
from support.mixtures import logits_of
from support.peft_side import PEFT_WARNINGS
from support.tiny import llama, tokens
from support.usages import Adapters, build, generated

SCRIPT = """
from {package} import PeftConfig, PeftModel, PeftType, TaskType, XLoraConfig, get_peft_model

config = XLoraConfig(
    task_type=TaskType.CAUSAL_LM, hidden_size=base.config.hidden_size, adapters=adapters, xlora_depth=2, xlora_size=16
)
assert config.peft_type == PeftType.XLORA and isinstance(config, PeftConfig)
torch.manual_seed(0)
model = get_peft_model(base, config)
assert isinstance(model, PeftModel)
model.print_trainable_parameters()
counts = model.get_nb_trainable_parameters()
classifier = model.internal_xlora_classifier
classifier.load_state_dict(router)
assert classifier.config.xlora_depth == 2
assert [type(layer).__name__ for layer in classifier.layers] == ["Linear", "ReLU", "Dropout", "Linear"]
model.eval()

def run():
    with torch.no_grad():
        return model(input_ids).logits

results["plain"] = run()
results["scalings"] = model.get_latest_scalings()
results["internal"] = model.internal_xlora_scalings
model.set_topk_lora(1)
results["top-k"] = run()
model.set_topk_lora(None)
model.set_global_scaling_weight(0.5)
assert model.get_global_scaling_weight() == 0.5
results["weight"] = run()
model.set_global_scaling_weight(1.0)
model.set_scaling_pass_value(0.3)
results["pass value"] = run()
model.set_scaling_pass_value(None)
results["pass value of 1/E"] = run()
model.set_scaling_pass_value(0.0)
model.enable_scalings_logging()
run()
run()
model.disable_scalings_logging()
run()
results["log"] = torch.stack([entry.cpu() for entry in model.get_scalings_log()])
(length, (positions, entries)), = model.get_bucketed_scalings_log().items()
results["bucket"] = torch.stack([entry.cpu() for entry in entries])
assert (length, positions) == (input_ids.shape[1], [0, 1])
model.clear_scalings_log()
assert model.get_scalings_log() == []
with model.disable_adapter():
    results["disabled"] = run()
results["generated"] = model.generate(input_ids=input_ids, max_new_tokens=4, do_sample=False)
model.save_pretrained(folder)
assert PeftConfig.from_pretrained(folder).to_dict()["xlora_depth"] == 2
"""


def router() -> dict[str, torch.Tensor]:
    torch.manual_seed(6)
    shapes = {"layers.0.weight": (16, 64), "layers.0.bias": (16,), "layers.3.weight": (3, 16), "layers.3.bias": (3,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def execute(package: str, adapters: dict[str, str], folder: Path) -> dict[str, Any]:
    base = llama()
    base.config.use_cache = False  # PEFT asks for it
    numbered = {str(i): place for i, place in enumerate(adapters.values())}
    results: dict[str, Any] = {}
    names = {"base": base, "adapters": numbered, "router": router(), "folder": folder, "input_ids": tokens()}
    scope = {"torch": torch, "results": results, **names}
    exec(SCRIPT.format(package=package), scope)
    return {**results, "counts": scope["counts"]}


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_one_script_runs_with_both_imports(
    adapters: Adapters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = execute("peft", adapters(3), tmp_path / "peft")
    their_text = capsys.readouterr().out
    ours = execute("loramix", adapters(3), tmp_path / "loramix")
    our_text = capsys.readouterr().out
    assert our_text == their_text
    assert re.fullmatch(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}\n", our_text)
    assert ours.keys() == theirs.keys()
    assert ours.pop("counts") == theirs.pop("counts")
    for name in ours:
        assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


NAMES = [
    "set_topk_lora",
    "get_global_scaling_weight",
    "set_global_scaling_weight",
    "set_scaling_pass_value",
    "get_latest_scalings",
    "enable_scalings_logging",
    "disable_scalings_logging",
    "get_scalings_log",
    "clear_scalings_log",
    "get_bucketed_scalings_log",
    "disable_adapter",
    "print_trainable_parameters",
    "get_nb_trainable_parameters",
    "save_pretrained",
    "get_base_model",
    "generate",
]


def test_the_model_has_every_name(adapters: Adapters) -> None:
    model = build(adapters, "basic")
    assert [name for name in NAMES if not callable(getattr(model, name))] == []
    assert list(model.peft_config) == ["default"]
    assert isinstance(model.peft_config["default"], XLoraConfig)
    assert isinstance(model.internal_xlora_classifier, XLoraClassifier)
    assert isinstance(model.internal_xlora_classifier.layers, nn.Sequential)
    assert model.internal_xlora_classifier.config is model.peft_config["default"]
    assert model.internal_xlora_scalings is None
    assert all(isinstance(model.get_submodule(path), XLoraLayer) for path in model.adapted_modules)
    assert model.get_base_model() is model


def test_what_it_is_an_instance_of(adapters: Adapters) -> None:
    model = build(adapters)
    plain: Any = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    for one in (model, plain):
        assert isinstance(one, PeftModel)
        assert isinstance(one, PreTrainedModel)
        assert isinstance(one, transformers.LlamaForCausalLM)
        assert type(one).__name__ == "LlamaForCausalLM"
    assert isinstance(model, XLoraModel)
    assert not isinstance(plain, XLoraModel)
    assert not isinstance(llama(), PeftModel)


def test_the_base_classs_from_pretrained_is_its_own(adapters: Adapters, tmp_path: Path) -> None:
    model = build(adapters)
    llama().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(logits_of(again), logits_of(llama()))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is transformers.LlamaForCausalLM
    assert torch.equal(logits_of(plain), logits_of(llama()))


def test_unload_gives_the_base_model_back(adapters: Adapters) -> None:
    base = llama()
    before = {name: type(module) for name, module in base.named_modules()}
    model: Any = get_peft_model(base, XLoraConfig(hidden_size=64, adapters=adapters(2)))
    assert model is base
    assert model.unload() is base
    assert type(base) is transformers.LlamaForCausalLM
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert torch.equal(logits_of(base), logits_of(llama()))
    assert torch.equal(generated(base), generated(llama()))
    assert isinstance(get_peft_model(base, XLoraConfig(hidden_size=64, adapters=adapters(2))), XLoraModel)


AUTO: dict[str, tuple[Callable[..., Any], type[Any], str]] = {
    "causal": (transformers.LlamaForCausalLM, AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "classification": (transformers.LlamaForSequenceClassification, AutoPeftModelForSequenceClassification, "SEQ_CLS"),
    "backbone": (transformers.LlamaModel, AutoPeftModel, "FEATURE_EXTRACTION"),
}


@pytest.mark.parametrize("kind", AUTO)
def test_base_and_mixture_come_from_one_call(kind: str, tmp_path: Path) -> None:
    make, auto, task = AUTO[kind]
    torch.manual_seed(2)
    make(llama().config).save_pretrained(tmp_path / "base")
    base = make.from_pretrained(tmp_path / "base")
    folders = {}
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        settings = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": task}
        expert: Any = get_peft_model(make.from_pretrained(tmp_path / "base"), LoraConfig(**settings))
        expert.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    model: Any = get_peft_model(base, XLoraConfig(task_type=task, hidden_size=64, adapters=folders)).eval()
    with torch.no_grad():
        expected = model(tokens())[0]
        model.save_pretrained(tmp_path / "mixture")
        loaded = auto.from_pretrained(tmp_path / "mixture")
        assert isinstance(loaded, make)
        assert isinstance(loaded, XLoraModel)
        assert torch.equal(loaded(tokens())[0], expected)
        alone = auto.from_pretrained(tmp_path / "math")
        assert isinstance(alone, PeftModel)
        assert not torch.equal(alone(tokens())[0], expected)


def test_without_a_base_models_name_one_call_is_not_enough(adapters: Adapters, tmp_path: Path) -> None:
    build(adapters).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="names its base model") as caught:
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert "PeftModel.from_pretrained(base, path)" in caught.value.remedy


def test_a_model_prepared_for_kbit_training_trains_its_router(adapters: Adapters) -> None:
    base = llama().to(torch.bfloat16)
    prepared = prepare_model_for_kbit_training(base)
    assert prepared is base
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    assert is_checkpointing(base)
    plain: Any = prepare_model_for_kbit_training(llama(), use_gradient_checkpointing=False)
    assert not is_checkpointing(plain)
    model: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=adapters(2))).train()
    expected = gradients(model)
    prepared = prepare_model_for_kbit_training(llama())
    checkpointed: Any = get_peft_model(prepared, XLoraConfig(hidden_size=64, adapters=adapters(2))).train()
    checkpointed.internal_xlora_classifier.load_state_dict(model.internal_xlora_classifier.state_dict())
    assert_close(gradients(checkpointed), expected)


def gradients(model: Any) -> list[torch.Tensor]:
    model(tokens(), labels=tokens()).loss.backward()
    return [parameter.grad for parameter in model.internal_xlora_classifier.parameters()]


def test_configurations_are_written_and_read_as_pefts_are(tmp_path: Path) -> None:
    import peft

    config = XLoraConfig(task_type=TaskType.CAUSAL_LM, hidden_size=64, adapters={"a": "b"}, top_k_lora=1)
    config.save_pretrained(tmp_path / "x")
    theirs = peft.XLoraConfig.from_pretrained(str(tmp_path / "x")).to_dict()
    assert {name: theirs[name] for name in config.to_dict() if name != "peft_version"} == {
        name: value for name, value in config.to_dict().items() if name != "peft_version"
    }
    lora = LoraConfig(r=3, target_modules=["q_proj"], use_rslora=True)
    lora.save_pretrained(tmp_path / "l")
    assert peft.LoraConfig.from_pretrained(str(tmp_path / "l")).target_modules == {"q_proj"}
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "x"), XLoraConfig)
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "l"), LoraConfig)
    assert {PeftType.XLORA.value, PeftType.LORA.value} <= {member.value for member in peft.PeftType}
    assert set(loramix.XLoraConfig.__dataclass_fields__) >= set(peft.XLoraConfig.__dataclass_fields__) - {
        "peft_version"
    }
