"""Starts of layer routers, from labelled text and from text without labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix import ConfigurationError, DataError, XLoraConfig, get_peft_model
from loramix.passes.state import state_of
from loramix.training import init_router
from loramix.training.layer_start import Calibration, LayerStart
from support.tiny import llama, tokens

RANGES = ((4, 30), (30, 60), (60, 96))


def mixture(experts: Any, kind: str = "linear", **config: Any) -> Any:
    return get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=experts("llama"), router=kind, **config)).eval()


def batches(labels: bool = True) -> Iterator[Mapping[str, Tensor]]:
    """Each expert's texts use words of its own; some are padded."""
    generator = torch.Generator().manual_seed(0)
    for number, ends in enumerate(RANGES):
        ids = torch.randint(*ends, (6, 30), generator=generator)
        mask = torch.ones_like(ids)
        ids[0, -5:], mask[0, -5:] = 0, 0
        batch = {"input_ids": ids, "attention_mask": mask}
        yield {**batch, "expert_ids": torch.full((len(ids),), number)} if labels else batch


@pytest.mark.parametrize("config", [{}, {"softmax_temperature": 0.5}, {"enable_softmax": False}], ids=str)
def test_labels_send_each_text_to_its_expert(config: dict[str, Any], experts: Any) -> None:
    model = mixture(experts, **config)
    start = init_router(model, "labels", batches=batches())
    assert isinstance(start, LayerStart)
    assert len(start.accuracy) == len(model.adapted_modules)
    assert max(start.accuracy) > 0.7
    for batch in batches():
        with torch.no_grad():
            model(batch["input_ids"])
        chosen = model.get_latest_scalings().mean(dim=(0, 1, 2)).argmax()
        assert chosen == batch["expert_ids"][0]
    assert state_of(model).hooks == ()


def test_labels_are_ridge_regression_in_a_uniform_mixture(experts: Any) -> None:
    model = mixture(experts, enable_softmax=False)
    stack, seen = model.get_submodule(model.adapted_modules[0]).stack, []
    handle = model.get_submodule(model.adapted_modules[0]).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    init_router(model, "labels", batches=batches())
    handle.remove()
    real = [batch["attention_mask"].bool() for batch in batches()]
    h = torch.cat([(x @ stack.lora_A.T)[mask] for x, mask in zip(seen, real, strict=True)])
    h = (h / h.square().mean(-1, keepdim=True).sqrt()).double()
    e = torch.cat([torch.full((int(mask.sum()),), number) for number, mask in enumerate(real)])
    X = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
    ridge = 1e-3 * X.square().sum(0)[:-1].mean() * torch.eye(X.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 0
    expected = torch.linalg.solve(X.T @ X + ridge, X.T @ torch.nn.functional.one_hot(e, 3).double()).T.float()
    assert_close(model.router.layer_weight(0).detach(), expected[:, :-1], atol=1e-4, rtol=1e-3)
    assert_close(model.router.bias[0].detach(), expected[:, -1], atol=1e-4, rtol=1e-3)


def test_sorted_labels_give_the_scale_and_accuracy_of_all_tokens(experts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts come expert by expert; the sample that the scale is chosen by is of all of them."""
    whole, model = mixture(experts), mixture(experts)
    expected = init_router(whole, "labels", batches=batches())
    monkeypatch.setattr("loramix.training.layer_start._SAMPLE", 170)
    found = init_router(model, "labels", batches=batches())
    assert isinstance(expected, LayerStart)
    assert isinstance(found, LayerStart)
    assert_close(torch.tensor(found.accuracy), torch.tensor(expected.accuracy), atol=0.15, rtol=0.0)
    scales = (model.router.bias / whole.router.bias).log().abs()
    assert scales.median() < 0.2


@pytest.mark.parametrize("kind", ["linear", "static"])
def test_zeros_are_uniform(kind: str, experts: Any) -> None:
    model = mixture(experts, kind)
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.normal_()
    assert init_router(model, "zeros") is None
    model(tokens())
    assert_close(model.get_latest_scalings(), torch.full_like(model.get_latest_scalings(), 1 / 3))


def test_a_norm_router_is_calibrated_and_compared_with_the_uniform_mixture(experts: Any) -> None:
    model = mixture(experts, "norm")
    with model.fixed_scalings([1 / 3] * 3), torch.no_grad():
        losses = []
        for batch in batches(labels=False):
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            losses.append(model(**batch, labels=labels).loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = init_router(model, "text", batches=batches(labels=False))
    assert isinstance(found, Calibration)
    said = [str(each.message) for each in caught if "no better than the uniform mixture" in str(each.message)]
    assert len(said) == (found.loss >= found.uniform)
    assert_close(found.uniform, float(torch.stack(losses).mean()), atol=1e-4, rtol=1e-4)
    assert model.router.mean.isfinite().all()
    assert (model.router.deviation > 0).all()


def test_what_a_kind_cannot_start_from_is_refused(experts: Any) -> None:
    given: dict[str, Any] = {"batches": list(batches())}
    for kind, method in (("arrow", "labels"), ("norm", "labels"), ("arrow", "text")):
        with pytest.raises(ConfigurationError, match=kind):
            init_router(mixture(experts, kind), method, **given)
    with pytest.raises(ConfigurationError, match="calibrated on text"):
        init_router(mixture(experts, "norm"), "zeros")
    with pytest.raises(DataError, match="no token for 'prose'"):
        init_router(mixture(experts), "labels", batches=given["batches"][:2])
    short = [{"input_ids": tokens(1)}]
    with pytest.raises(DataError, match="at least 256 tokens"):
        init_router(mixture(experts, "norm"), "text", batches=short)
