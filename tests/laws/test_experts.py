"""What the experts of a mixture are to each other: their order, their names, their parts, their absence."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import loramix
from loramix.passes.specialise import specialise
from support.disk import WEIGHTS, edited
from support.mixtures import HARD, SPARSE, far, logits_of, mixture
from support.tiny import ARCHITECTURES, llama, save_expert, tokens

Experts = Callable[[str], dict[str, str]]


def test_one_expert_at_scaling_one_is_plain_lora(experts: Experts) -> None:
    folder = experts("llama")["code"]
    model = mixture({"only": folder})  # a softmax over one expert is 1
    plain = loramix.PeftModel.from_pretrained(llama(), folder)
    assert model.get_latest_scalings() is None
    assert_close(logits_of(model), logits_of(plain), atol=1e-6, rtol=1e-6)
    assert torch.equal(model.get_latest_scalings(), torch.ones(2, 9, 14, 1))
    with model.disable_adapter():
        assert far(logits_of(model), logits_of(plain))


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("gating", [{}, SPARSE, HARD], ids=["dense", "sparse", "hard"])
def test_permuting_experts_permutes_the_scalings_and_nothing_else(
    layerwise: bool, gating: dict[str, object], experts: Experts
) -> None:
    given, order = experts("llama"), [2, 0, 1]
    model = mixture(given, layerwise_scalings=layerwise, **gating)
    names = list(given)
    permuted = mixture({names[i]: given[names[i]] for i in order}, layerwise_scalings=layerwise, **gating)
    assert far(logits_of(permuted), logits_of(model))  # the router's rows still have the old order
    for tensor, own in zip(permuted.internal_xlora_classifier.layers[0].parameters(), _router(model), strict=True):
        tensor.data = own.unflatten(0, (-1, 3))[:, order].flatten(0, 1).clone()
    assert_close(logits_of(permuted), logits_of(model), atol=1e-5, rtol=1e-5)
    assert_close(permuted.get_latest_scalings(), model.get_latest_scalings()[..., order], atol=1e-6, rtol=1e-6)


def test_names_do_not_matter(experts: Experts) -> None:
    given = experts("llama")
    renamed = mixture(dict(zip(["2", "0", "a b"], given.values(), strict=True)))
    assert torch.equal(logits_of(renamed), logits_of(mixture(given)))
    assert renamed.expert_names == ["2", "0", "a b"]


def test_an_expert_split_in_two_halves_of_its_rank_is_the_same_expert(tmp_path: Path) -> None:
    whole = save_expert(tmp_path / "whole", llama(), target_modules=["q_proj", "down_proj"], r=6, lora_alpha=6)
    halves = {
        name: _part_of(whole, tmp_path / name, part) for name, part in {"a": slice(0, 3), "b": slice(3, 6)}.items()
    }
    expected = logits_of(loramix.PeftModel.from_pretrained(llama(), whole))
    model = mixture(halves)
    with model.fixed_scalings([1.0, 1.0]):
        assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    with model.fixed_scalings([1.0, 0.0]):
        assert far(logits_of(model), expected)


def test_an_absent_expert_adds_nothing_and_the_others_are_not_renormalised(tmp_path: Path) -> None:
    """Two experts of different modules at 1/2: each module has half of its one expert."""
    wide = save_expert(tmp_path / "wide", llama(), target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8)
    q = save_expert(tmp_path / "q", llama(), seed=1, target_modules=["q_proj"])
    model = mixture({"wide": wide, "q": q})
    assert [model.get_submodule(path).stack.members for path in model.adapted_modules] == [(0, 1), (0,)] * 2
    with model.fixed_scalings([0.5, 0.0]):
        half = logits_of(model)
    alone = mixture({"wide": str(edited(wide, tmp_path / "half", lora_alpha=4))})
    with alone.fixed_scalings([1.0]):
        assert_close(half, logits_of(alone), atol=1e-5, rtol=1e-5)
    with model.fixed_scalings([1.0, 0.0]):
        assert far(logits_of(model), half)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disabling_gives_the_base_model_bit_by_bit(architecture: str, experts: Experts) -> None:
    base = ARCHITECTURES[architecture]()
    with torch.no_grad():
        expected = base(tokens(), output_hidden_states=True)
    model = mixture(experts(architecture), base=base)
    with model.disable_adapter(), torch.no_grad():
        got = model(tokens(), output_hidden_states=True)
    assert torch.equal(got.logits, expected.logits)
    assert all(map(torch.equal, got.hidden_states, expected.hidden_states))
    assert far(logits_of(model), expected.logits)


def test_without_weight_the_experts_are_the_base_model_bit_by_bit(experts: Experts) -> None:
    model = mixture(experts("llama"), global_scaling_weight=0.0)
    expected = logits_of(llama())
    assert torch.equal(logits_of(model), expected)
    model.set_global_scaling_weight(1.0)
    assert far(logits_of(model), expected)


def test_the_global_weight_scales_what_fixed_scalings_add(experts: Experts) -> None:
    model = mixture(experts("llama"))
    with model.fixed_scalings([0.5, 0.1, 0.2]):
        expected = logits_of(model)
    model.set_global_scaling_weight(0.5)
    with model.fixed_scalings([1.0, 0.2, 0.4]):
        assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    with model.fixed_scalings([0.5, 0.1, 0.2]):
        assert far(logits_of(model), expected)


def test_unloading_gives_the_base_model_back(experts: Experts) -> None:
    base = llama()
    kind, modules, expected = type(base), list(base.named_modules()), logits_of(base)
    model = mixture(experts("llama"), base=base)
    assert model is base
    assert type(base) is not kind
    assert model.unload() is base
    assert type(base) is kind
    assert list(base.named_modules()) == modules
    assert torch.equal(logits_of(base), expected)


def test_a_model_unpickled_by_another_process_is_the_same_and_recognised(experts: Experts) -> None:
    model = mixture(experts("llama"))
    expected, pickled = logits_of(model), pickle.dumps(model)
    specialise.cache_clear()  # another process has made none of the classes yet
    same = pickle.loads(pickled)
    assert type(same) is not type(model)
    assert torch.equal(logits_of(same), expected)
    assert isinstance(same, loramix.PeftModel)
    assert isinstance(same, loramix.XLoraModel)
    plain = loramix.get_peft_model(llama(), loramix.LoraConfig(target_modules=["q_proj"]))
    assert isinstance(plain, loramix.PeftModel)
    assert not isinstance(plain, loramix.XLoraModel)
    assert not isinstance(llama(), loramix.PeftModel)


def _router(model: loramix.PeftModel) -> list[torch.Tensor]:
    return [parameter.data for parameter in model.internal_xlora_classifier.layers[0].parameters()]


def _part_of(expert: str, folder: Path, part: slice) -> str:
    """Some of an expert's ranks, as an expert of its own with the same c = alpha / r."""
    rank = part.stop - part.start
    edited(expert, folder, r=rank, lora_alpha=rank)
    cut = {name: t[part] if "lora_A" in name else t[:, part] for name, t in load_file(folder / WEIGHTS).items()}
    save_file({name: tensor.contiguous() for name, tensor in cut.items()}, folder / WEIGHTS)
    return str(folder)
