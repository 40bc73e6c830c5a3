"""Base models and mixtures whose weights accelerate keeps elsewhere, and brings layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from loramix import (
    LoraConfig,
    ModelError,
    PeftModel,
    UnsupportedAdapterError,
    UnsupportedOperationError,
    XLoraConfig,
    create_reference_model,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from support.mixtures import logits_of, mixture
from support.tiny import llama, save_experts, tokens
from support.versions import needs_transformers

Experts = Callable[[str], dict[str, str]]
Offload = Callable[[Any, Path], Any]
CPU = torch.device("cpu")
PARTS = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
MAP = {**PARTS, "model.rotary_emb": "cpu", "lm_head": "disk"}
BLOCKS = ["LlamaDecoderLayer"]


def mapped(model: Any, folder: Path) -> Any:
    router = {"internal_xlora_classifier": "disk"} if hasattr(model, "internal_xlora_classifier") else {}
    return dispatch_model(model, MAP | router, main_device="cpu", offload_dir=str(folder / "offload"))


OFFLOAD: dict[str, Offload] = {
    "to the CPU": lambda model, _: cpu_offload(model, execution_device=CPU),
    "with buffers": lambda model, _: cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "to disk": lambda model, folder: disk_offload(model, str(folder / "offload"), execution_device=CPU),
    "by a map": mapped,
}


def by_transformers(folder: Path, **where: Any) -> Any:
    llama().save_pretrained(folder / "base")
    settings = {"offload_folder": str(folder / "offload"), **where}
    return AutoModelForCausalLM.from_pretrained(folder / "base", **settings).eval()


LOADED: dict[str, dict[str, Any]] = {
    "auto": {"device_map": "auto"},
    "auto, in part on disk": {"device_map": "auto", "max_memory": {"cpu": 180_000}},
    "on disk": {"device_map": {"": "disk"}},
}
BASES: dict[str, Callable[[Path], Any]] = {
    **{name: lambda folder, way=way: way(llama(), folder) for name, way in OFFLOAD.items()},
    **{name: lambda folder, where=where: by_transformers(folder, **where) for name, where in LOADED.items()},
}


ON_DISK = needs_transformers(5, 8, "weights that are all on disk come without accelerate's hooks; they are refused")
# Before transformers 5.18 `generate` says so of every offloaded model, with experts or without.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the .input_ids.:UserWarning")


@pytest.fixture(params=[pytest.param(name, marks=[ON_DISK] if name == "on disk" else []) for name in BASES])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return BASES[request.param](tmp_path)


def test_a_mixture_on_an_offloaded_base(base: Any, experts: Experts, tmp_path: Path) -> None:
    model, same = mixture(experts("llama"), base=base), mixture(experts("llama"))
    expected, settings = logits_of(same), {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(model.generate(tokens(), **settings), same.generate(tokens(), **settings))
    model.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path / "mixture")), expected)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    assert torch.equal(logits_of(create_reference_model(model)), expected)
    grads = []
    for each in (model.train(), same.train()):
        each(tokens(), labels=tokens()).loss.backward()
        grads.append([p.grad for p in each.parameters() if p.requires_grad])
    assert_close(*grads)
    assert torch.equal(logits_of(model.eval().unload()), logits_of(llama()))


def test_a_saved_mixture_is_loaded_on_an_offloaded_base(base: Any, experts: Experts, tmp_path: Path) -> None:
    saved = mixture(experts("llama"))
    saved.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path / "mixture")), logits_of(saved))


def test_dora_reads_the_offloaded_weight(base: Any, tmp_path: Path) -> None:
    folders = save_experts(tmp_path / "experts", "llama", use_dora=True)
    assert torch.equal(logits_of(mixture(folders, base=base)), logits_of(mixture(folders)))


def test_a_new_expert_of_an_offloaded_base(base: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model: Any = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), config)
    assert_close(logits_of(model), logits_of(llama()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", OFFLOAD)
def test_a_mixture_that_is_offloaded(way: str, experts: Experts, tmp_path: Path) -> None:
    same = mixture(experts("llama"))
    expected, settings = logits_of(same), {"max_new_tokens": 6, "do_sample": False}
    model = OFFLOAD[way](mixture(experts("llama")), tmp_path)
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(model.generate(tokens(), **settings), same.generate(tokens(), **settings))
    model.save_pretrained(tmp_path / "mixture")
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path / "mixture")), expected)
    with pytest.raises(UnsupportedOperationError, match="What trains is in memory"):
        model.train()(tokens(), labels=tokens())
    remove_hook_from_module(model.eval(), recurse=True)
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(OFFLOAD[way](model, tmp_path / "again")), expected)


@pytest.mark.parametrize("way", OFFLOAD)
def test_fixed_routing_of_an_offloaded_mixture(way: str, experts: Experts, tmp_path: Path) -> None:
    model = OFFLOAD[way](mixture(experts("llama")), tmp_path)
    model.fix_routing(prompt={"input_ids": tokens()})
    expected = logits_of(model)
    model.save_fixed(tmp_path / "fixed")
    assert_close(logits_of(PeftModel.from_pretrained(llama(), tmp_path / "fixed")), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedOperationError, match="offloaded"):
        model.merge_and_unload()


def test_a_static_router_is_offloaded(experts: Experts, tmp_path: Path) -> None:
    config = XLoraConfig(adapters=experts("llama"), router="static", layerwise_scalings=True)
    model: Any = get_peft_model(llama(), config).eval()
    model.internal_xlora_router.logits.data.normal_()
    expected = logits_of(model)
    assert torch.equal(logits_of(cpu_offload(model, execution_device=CPU)), expected)


def test_blocks_that_are_offloaded_as_a_whole(experts: Experts, tmp_path: Path) -> None:
    base = cpu_offload(llama(), execution_device=CPU, preload_module_classes=BLOCKS)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj"):
        mixture(experts("llama"), base=base)
    model = mixture(experts("llama"))
    expected = logits_of(model)
    cpu_offload(model, execution_device=CPU, preload_module_classes=BLOCKS)
    assert torch.equal(logits_of(model), expected)
    for call in (model.unload, lambda: model.save_fixed(tmp_path)):
        model.fix_routing([0.2, 0.3, 0.5])
        with pytest.raises(UnsupportedOperationError, match="as a whole"):
            call()


def test_rows_that_are_saved_with_an_expert_are_not_written_into_an_offloaded_weight(tmp_path: Path) -> None:
    folders: dict[str, str] = {}
    for name, change in (("same", 0.0), ("other", 1.0)):
        model: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.model.embed_tokens.weight.requires_grad_(True)
        model.model.embed_tokens.weight.data[5] += change
        model.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    base = cpu_offload(llama(), execution_device=CPU)
    with pytest.raises(UnsupportedAdapterError, match=r"rows 5 of 'model\.embed_tokens\.weight'"):
        mixture({"other": folders["other"]}, base=base)
    model = mixture({"same": folders["same"]}, base=base)
    assert torch.equal(logits_of(model), logits_of(mixture({"same": folders["same"]})))


def test_trying_an_offloaded_base_copies_no_weights(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = cpu_offload(llama(), execution_device=CPU)
    kept = {id(tensor) for tensor in base.model.norm._hf_hook.weights_map.dataset.values()}
    clone = torch.Tensor.__deepcopy__

    def watched(tensor: Any, memo: Any) -> Any:
        assert id(tensor) not in kept
        return clone(tensor, memo)

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", watched)
    mixture(experts("llama"), base=base)
