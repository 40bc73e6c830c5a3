"""Mixtures on quantised base models: what the experts add is added to what the quantised layers compute."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from loramix import (
    LoraConfig,
    PeftModel,
    UnsupportedAdapterError,
    UnsupportedOperationError,
    XLoraConfig,
    create_reference_model,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from support.mixtures import logits_of, mixture
from support.quantised import KINDS, Kind, dequantised, linear_layers
from support.refusals import refused
from support.tiny import TARGETS, llama, save_expert, save_experts, tokens

Experts = Callable[[str], dict[str, str]]
SETTINGS: dict[str, Any] = {"layerwise_scalings": True, "xlora_depth": 1}


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(_is_missing(kind.package), reason=f"{kind.package} is missing"))
        for name, kind in KINDS.items()
    ]
)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def tolerance(kind: Kind) -> dict[str, float]:
    return {"atol": 0.15, "rtol": 0.0} if kind.rounds else {"atol": 1e-4, "rtol": 1e-4}


@pytest.mark.filterwarnings("default")
def test_a_mixture_on_a_quantised_base(kind: Kind, plain_folder: Path, experts: Experts, tmp_path: Path) -> None:
    def new(**settings: Any) -> Any:
        return mixture(experts("llama"), base=kind.make(plain_folder), **SETTINGS, **settings)

    same = mixture(experts("llama"), base=dequantised(kind, kind.make(plain_folder)), **SETTINGS)
    model, expected = new(), logits_of(same)
    got = logits_of(model)
    assert_close(got, expected, **tolerance(kind))
    with model.disable_adapter():
        assert (logits_of(model) - expected).abs().max() > 0.3

    for how in ({}, {"lockstep": False}, {"use_cache": False}):
        settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(tokens(), **settings, **how)
        whole = logits_of(model, out.sequences, use_cache=False)
        assert_close(torch.stack(out.logits, 1), whole[:, 8:-1], **tolerance(kind))
        assert kind.rounds or torch.equal(out.sequences[:, 9:], whole[:, 8:-1].argmax(-1))

    model.save_pretrained(tmp_path / "mixture")
    assert_close(logits_of(PeftModel.from_pretrained(kind.make(plain_folder), tmp_path / "mixture")), got)
    assert_close(logits_of(create_reference_model(model)), got)
    if kind.copies:
        assert_close(logits_of(copy.deepcopy(model)), got)
    model.fix_routing([0.2, 0.3, 0.5])
    with pytest.raises(UnsupportedOperationError, match="a quantised one"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("default")
def test_every_layer_acts(kind: Kind, plain_folder: Path, experts: Experts) -> None:
    model = mixture(experts("llama"), base=kind.make(plain_folder), **SETTINGS)
    moved: dict[str, float] = {}
    for path in model.adapted_modules:
        layer = model.get_submodule(path)
        layer.base_layer.register_forward_hook(lambda _m, _x, y, path=path: moved.update({path: y.detach().clone()}))
        layer.register_forward_hook(
            lambda _m, _x, y, path=path: moved.update({path: float((y - moved[path]).abs().max())})
        )
    logits_of(model)
    assert len(moved) == len(TARGETS["llama"]) * 2
    assert min(moved.values()) > 1e-3


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("trainable", [False, True])
def test_training(trainable: bool, kind: Kind, plain_folder: Path, experts: Experts) -> None:
    settings = {**SETTINGS, "use_trainable_adapters": trainable}
    bases = kind.make(plain_folder), dequantised(kind, kind.make(plain_folder))
    model, same = (mixture(experts("llama"), base=base, **settings).train() for base in bases)
    losses = model(tokens(), labels=tokens()).loss, same(tokens(), labels=tokens()).loss
    if not kind.trains:
        with pytest.raises(UnsupportedOperationError, match="whose output has none"):
            losses[0].backward()
        return
    sum(losses).backward()
    grads = [{n: p.grad for n, p in each.named_parameters() if p.requires_grad} for each in (model, same)]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() < (0.05 if kind.rounds else 1e-3) * grads[1][name].norm(), name


@pytest.mark.filterwarnings("default")
def test_dora_takes_the_norm_of_the_dequantised_weight(kind: Kind, plain_folder: Path, tmp_path: Path) -> None:
    folders = save_experts(tmp_path, "llama", use_dora=True)
    model = mixture(folders, base=kind.make(plain_folder), **SETTINGS)
    same = mixture(folders, base=dequantised(kind, kind.make(plain_folder)), **SETTINGS)
    for path in model.adapted_modules:
        norms = (each.get_submodule(path).stack.dora_norm for each in (model, same))
        assert_close(*norms, atol=0.0, rtol=5e-3 if kind.rounds else 1e-4)
    assert_close(logits_of(model), logits_of(same), **tolerance(kind))


@pytest.mark.filterwarnings("default")
def test_quantised_parameters_are_left_alone(kind: Kind, plain_folder: Path, experts: Experts) -> None:
    base = kind.make(plain_folder)
    before = [(type(p), p.dtype, p.shape) for p in base.parameters()]
    expected = logits_of(kind.make(plain_folder))
    prepared: Any = prepare_model_for_kbit_training(base)
    assert [(type(p), p.dtype, p.shape) for p in base.parameters()] == before
    assert_close(logits_of(prepared), expected)
    model = mixture(experts("llama"), base=prepare_model_for_kbit_training(kind.make(plain_folder)), **SETTINGS).train()
    loss = model(tokens(), labels=tokens()).loss
    if not kind.rounds:
        loss.backward()
    assert torch.isfinite(loss)


class Packed(nn.Module):
    """A linear layer with two 4-bit weights in each byte, a scale in half precision, and a choice of habits.

    Args:
        linear: what it stands for.
        step: it rounds its input to multiples of this, if given, without a gradient.
    """

    def __init__(self, linear: nn.Linear, step: float | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = (linear.weight.detach().abs().amax() / 7).half()
        levels = (linear.weight.detach() / scale).round().clamp(-7, 7).to(torch.int8) + 8
        self.register_buffer("packed", levels[:, ::2] * 16 + levels[:, 1::2] - 128)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.step = step
        self.packed_for: torch.dtype | None = None

    def dense(self) -> Tensor:
        levels = self.packed.to(torch.int16) + 128
        return (torch.stack([levels // 16, levels % 16], -1).flatten(1) - 8) * self.scale.float()

    def forward(self, x: Tensor) -> Tensor:
        assert self.packed_for in (None, x.dtype), "packed for another dtype"
        self.packed_for = x.dtype
        if self.step is not None:
            x = (x.detach() / self.step).round() * self.step
        return F.linear(x, self.dense().to(x.dtype))


class FromBitsandbytes(Packed):
    __module__ = "bitsandbytes.nn"


def packed(kind: type[Packed] = Packed, **habits: Any) -> Any:
    base: Any = llama()
    for path, layer in linear_layers(base).items():
        base.set_submodule(path, kind(layer, **habits))
    return base


def as_dense(base: Any) -> Any:
    plain: Any = llama()
    for path, layer in linear_layers(plain).items():
        layer.weight.data = base.get_submodule(path).dense()
    return plain


def test_layers_that_a_quantiser_put_back_in_another_order_keep_their_scalings(
    experts: Experts, tmp_path: Path
) -> None:
    saved = mixture(experts("llama"), base=as_dense(packed()), **SETTINGS)
    saved.save_pretrained(tmp_path)
    base = packed()
    for block in base.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in sorted(part._modules):
                part._modules[name] = part._modules.pop(name)
    assert [path for path, _ in base.named_modules()] != [path for path, _ in llama().named_modules()]
    model: Any = PeftModel.from_pretrained(base, tmp_path)
    assert model.adapted_modules == saved.adapted_modules
    assert_close(logits_of(model), logits_of(saved))


def test_what_is_not_quantised_is_held_in_float32_beside_layers_that_take_any_dtype() -> None:
    for kind, expected in ((FromBitsandbytes, torch.float32), (Packed, torch.bfloat16)):
        base = packed(kind).to(torch.bfloat16)
        prepare_model_for_kbit_training(base)
        assert not any(parameter.requires_grad for parameter in base.parameters())
        assert base.model.layers[0].self_attn.q_proj.scale.dtype == torch.bfloat16
        assert base.model.norm.weight.dtype == expected
        assert base.lm_head.weight.dtype == expected


def test_no_gradient_is_lost_in_a_layer_that_has_none(experts: Experts) -> None:
    model = mixture(experts("llama"), base=packed(step=0.01))
    assert torch.isfinite(model(tokens(), labels=tokens()).loss)
    with pytest.raises(UnsupportedOperationError, match="a Packed whose output has none"):
        model.train()(tokens(), labels=tokens()).loss.backward()


def test_dora_is_refused_where_one_weight_does_not_tell_what_a_layer_computes(tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "one", llama(), target_modules=["q_proj"], use_dora=True)
    config = XLoraConfig(hidden_size=64, adapters={"one": folder})
    base = packed(step=0.3)
    told = refused(UnsupportedAdapterError, base, tmp_path, lambda: get_peft_model(base, config))
    assert "'model.layers.0.self_attn.q_proj': a Packed" in told.received


def test_finding_a_weight_leaves_the_layer_as_it_was(tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "one", llama(), target_modules=["q_proj"], use_dora=True)
    model = mixture({"one": folder}, base=packed())
    assert model.model.layers[0].self_attn.q_proj.base_layer.packed_for is None
    assert_close(logits_of(model), logits_of(mixture({"one": folder}, base=as_dense(packed()))), atol=1e-5, rtol=1e-5)


def test_experts_have_the_dtype_that_the_model_computes_in(experts: Experts) -> None:
    base: Any = llama()
    for path, layer in linear_layers(base).items():
        new: Any = Packed(layer)
        new.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.bfloat16), requires_grad=False)  # as it is stored
        base.set_submodule(path, new)
    model = mixture(experts("llama"), base=base)
    assert {layer.stack.lora_A.dtype for layer in map(model.get_submodule, model.adapted_modules)} == {torch.float32}


def test_a_compressed_model_is_unpacked_when_it_is_built(experts: Experts) -> None:
    base: Any = llama()
    unpacked: list[Any] = []
    base.ct_decompress_hook = base.register_forward_pre_hook(lambda model, _: unpacked.append(model))
    mixture(experts("llama"), base=base)
    assert unpacked == [base]


def test_a_saved_weight_does_not_take_the_place_of_a_quantised_one(tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(llama(), LoraConfig(r=2, **targets))
    model.lm_head.requires_grad_(True)
    model.save_pretrained(tmp_path / "expert")
    base: Any = llama()
    base.lm_head = Packed(base.lm_head)
    config = XLoraConfig(hidden_size=64, adapters={"one": str(tmp_path / "expert")})
    told = refused(UnsupportedAdapterError, base, tmp_path, lambda: get_peft_model(base, config))
    assert "quantised" in told.received
