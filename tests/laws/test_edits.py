"""Laws of editing a mixture, for every kind of router whose logit of an expert depends on that expert alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix import ConfigurationError, PeftModel, UnsupportedOperationError, XLoraConfig, get_peft_model
from loramix.formats import (
    MixtureCheckpoint,
    add_expert,
    load_adapter,
    load_mixture,
    remove_expert,
    rename_expert,
    reorder_experts,
    replace_expert,
    save_mixture,
)
from loramix.passes.state import attach
from loramix.routers import router_kinds
from support.mixtures import HARD, SPARSE, logits_of
from support.routers import EnergyRouter, PlainRouter, Seen
from support.tiny import llama

Experts = Callable[[str], dict[str, str]]
KINDS = {kind.kind: kind for kind in (*router_kinds(), PlainRouter, EnergyRouter)}
every_router = pytest.mark.parametrize(("kind", "layerwise"), [(k, each) for k in KINDS for each in (False, True)])


def saved(experts: Mapping[str, str], folder: Path, kind: str, **config: Any) -> MixtureCheckpoint:
    """A mixture whose router is far from its start, as data."""
    settings = XLoraConfig(hidden_size=64, adapters=dict(experts), router=kind, **config)
    model: Any = get_peft_model(llama(), settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.add_(torch.randn_like(parameter))
        if kind == "prototypes":
            model.router.scale.abs_().add_(0.1)
    model.save_pretrained(folder)
    try:
        KINDS[kind].expert_axes(settings, 1)
    except UnsupportedOperationError:
        pytest.skip(f"the logits of a {kind!r} router depend on all experts")
    return load_mixture(folder)


def loaded(mixture: MixtureCheckpoint, folder: Path) -> Any:
    save_mixture(folder, mixture.config, mixture.router, mixture.experts)
    return PeftModel.from_pretrained(llama(), folder)


def made(model: Any) -> Tensor:
    """(B, S, L or 1, E): the router's logits where each layer sees what it sees in the base model."""
    model.set_global_scaling_weight(0.0)
    hook = Seen()
    attach(model, hook)
    logits_of(model)
    model.set_global_scaling_weight(1.0)
    return hook.outputs[0].logits


@every_router
def test_another_order_is_another_order_of_the_scalings(
    kind: str, layerwise: bool, experts: Experts, tmp_path: Path
) -> None:
    start = saved(experts("llama"), tmp_path / "0", kind, layerwise_scalings=layerwise)
    turned = reorder_experts(start, ["prose", "math", "code"])
    one, other = loaded(start, tmp_path / "1"), loaded(turned, tmp_path / "2")
    assert_close(logits_of(other), logits_of(one), atol=1e-5, rtol=1e-5)
    assert_close(other.get_latest_scalings(), one.get_latest_scalings()[..., [2, 0, 1]], atol=1e-5, rtol=1e-5)
    back = reorder_experts(turned, list(start.config.adapters))
    assert all(torch.equal(back.router[name], tensor) for name, tensor in start.router.items())
    assert [expert.name for expert in back.experts] == list(back.config.adapters) == list(start.config.adapters)


@every_router
def test_without_an_expert_the_others_keep_their_logits(
    kind: str, layerwise: bool, experts: Experts, tmp_path: Path
) -> None:
    start = saved(experts("llama"), tmp_path / "0", kind, layerwise_scalings=layerwise)
    one, other = loaded(start, tmp_path / "1"), loaded(remove_expert(start, "code"), tmp_path / "2")
    assert other.expert_names == ["math", "prose"]
    assert_close(made(other), made(one)[..., [0, 2]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(other), logits_of(one), atol=1e-3)


@every_router
def test_another_name_changes_nothing(kind: str, layerwise: bool, experts: Experts, tmp_path: Path) -> None:
    start = saved(experts("llama"), tmp_path / "0", kind, layerwise_scalings=layerwise)
    one, other = loaded(start, tmp_path / "1"), loaded(rename_expert(start, "code", "数学"), tmp_path / "2")
    assert other.expert_names == ["math", "数学", "prose"]
    assert torch.equal(logits_of(other), logits_of(one))


COLD: dict[str, dict[str, Any]] = {
    "dense": {},
    "warm": {"softmax_temperature": 3.0},
    "top-k": {"top_k_lora": 3},
    "sparse": SPARSE,
    "hard": HARD,
    "logits": {"enable_softmax": False},
    "none": {"gating": "with-none"},
}


@pytest.mark.parametrize("gating", COLD)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cold_expert_changes_nothing_and_no_logit(kind: str, gating: str, experts: Experts, tmp_path: Path) -> None:
    settings = {"layerwise_scalings": True, **COLD[gating]}
    if kind in ("arrow", "norm") and gating in ("hard", "logits"):
        with pytest.raises(ConfigurationError, match="by a softmax"):
            saved(experts("llama"), tmp_path / "0", kind, **settings)
        return
    if kind == "evidence" and gating in ("hard", "logits"):
        with pytest.raises(ConfigurationError, match="Evidence adds up"):
            saved(experts("llama"), tmp_path / "0", kind, **settings)
        return
    start = saved(experts("llama"), tmp_path / "0", kind, **settings)
    new = load_adapter("new", experts("llama")["math"])
    if kind.startswith("test-"):  # kinds without anything like a bias
        with pytest.raises(UnsupportedOperationError, match=rf"router='{kind}'[\s\S]*column="):
            add_expert(start, new)
        return
    larger = add_expert(start, new)
    assert all(bool(tensor.isfinite().all()) for tensor in larger.router.values())
    one, other = loaded(start, tmp_path / "1"), loaded(larger, tmp_path / "2")
    assert other.expert_names == ["math", "code", "prose", "new"]
    assert_close(logits_of(other), logits_of(one), atol=1e-5, rtol=1e-5)
    assert other.get_latest_scalings()[..., 3].max() < 1e-8
    assert_close(made(other)[..., :3], made(one), atol=1e-5, rtol=1e-5)


def test_prototypes_with_a_scale_that_turns_logits_round_have_no_cold_expert(experts: Experts, tmp_path: Path) -> None:
    start = saved(experts("llama"), tmp_path / "0", "prototypes", layerwise_scalings=True)
    start.router["scale"][1] = -0.5
    with pytest.raises(UnsupportedOperationError, match=r"with a scale of -0.5[\s\S]*column="):
        add_expert(start, load_adapter("new", experts("llama")["math"]))


@every_router
def test_a_replaced_expert_takes_the_place_of_the_old_one(
    kind: str, layerwise: bool, experts: Experts, tmp_path: Path
) -> None:
    start = saved(experts("llama"), tmp_path / "0", kind, layerwise_scalings=layerwise)
    prose = load_adapter("prose", experts("llama")["prose"])
    if KINDS[kind].reads == "low-rank activation":
        with pytest.raises(UnsupportedOperationError, match=r"fitted to them[\s\S]*'code'"):
            replace_expert(start, "code", prose)
        return
    changed = replace_expert(start, "code", prose)
    one, other = loaded(start, tmp_path / "1"), loaded(changed, tmp_path / "2")
    assert other.expert_names == one.expert_names
    assert torch.equal(made(other), made(one))
    with one.fixed_scalings([0, 0, 1]), other.fixed_scalings([0, 1, 0]):
        assert_close(logits_of(other), logits_of(one), atol=1e-5, rtol=1e-5)


def test_a_cold_expert_has_no_share_where_every_expert_is_given_the_same(experts: Experts, tmp_path: Path) -> None:
    start = saved(experts("llama"), tmp_path / "0", "classifier", elsewhere={"down_proj": "uniform"})
    larger = add_expert(start, load_adapter("new", experts("llama")["math"]))
    one, other = loaded(start, tmp_path / "1"), loaded(larger, tmp_path / "2")
    assert_close(logits_of(other), logits_of(one), atol=1e-5, rtol=1e-5)
