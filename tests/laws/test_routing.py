"""What the scalings of a model obey: the three gatings, and that top-E is dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from support.mixtures import HARD, SPARSE, far, final_scalings, logits_of, mixture
from support.tiny import tokens

Experts = Callable[[str], dict[str, str]]


def test_top_E_is_dense(experts: Experts) -> None:
    model = mixture(experts("llama"), top_k_lora=3)
    every = logits_of(model)
    model.set_topk_lora(None)
    assert torch.equal(logits_of(model), every)
    model.set_topk_lora(2)
    assert far(logits_of(model), every)


def test_a_softmax_over_all_the_selected_is_the_dense_softmax(experts: Experts) -> None:
    dense = mixture(experts("llama"))
    sparse = mixture(experts("llama"), **{**SPARSE, "top_k_lora": 3})
    assert_close(logits_of(sparse), logits_of(dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layerwise", [False, True])
def test_sparse_scalings_sum_to_one_over_exactly_k(layerwise: bool, experts: Experts) -> None:
    s = final_scalings(mixture(experts("llama"), layerwise_scalings=layerwise, **SPARSE))
    assert_close(s.sum(-1), torch.ones(s.shape[:-1]))
    assert ((s > 0).sum(-1) == 2).all()


@pytest.mark.parametrize("layerwise", [False, True])
def test_hard_scalings_are_the_k_largest_logits_as_they_are(layerwise: bool, experts: Experts) -> None:
    model = mixture(experts("llama"), layerwise_scalings=layerwise, **HARD)
    s, z = final_scalings(model), model.get_latest_scalings()
    assert s.shape[-2] == (14 if layerwise else 1)
    z = z if layerwise else z[..., :1, :]
    assert torch.equal(s, torch.where(z == z.amin(-1, keepdim=True), 0.0, z))
    assert z.min() < 0


def test_a_selected_logit_of_zero_stays_selected(experts: Experts) -> None:
    model = mixture(experts("llama"), **SPARSE)
    last = model.internal_xlora_classifier.layers[-1]
    last.weight.data.zero_()
    last.bias.data = torch.tensor([0.0, -1.0, 1.0])
    expected = torch.softmax(torch.tensor([0.0, -torch.inf, 1.0]), dim=-1)
    assert_close(final_scalings(model), expected.expand(2, 9, 1, 3))


def test_what_is_reported_comes_before_the_selection(experts: Experts) -> None:
    dense, chosen = mixture(experts("llama")), mixture(experts("llama"), top_k_lora=1)
    logits_of(dense), logits_of(chosen)
    assert chosen.get_latest_scalings().shape == (2, 9, 14, 3)
    assert torch.equal(chosen.get_latest_scalings(), dense.get_latest_scalings())


def test_a_colder_router_is_sharper(experts: Experts) -> None:
    peaks = []
    for temperature in (0.5, 1.0, 2.0):
        model = mixture(experts("llama"), softmax_temperature=temperature)
        logits_of(model)
        peaks.append(model.get_latest_scalings().amax(-1))
    assert (peaks[0] > peaks[1]).all()
    assert (peaks[1] > peaks[2]).all()


def test_the_scaling_pass_is_not_gated(experts: Experts) -> None:
    """Its hidden states are those of a model in which every expert has the value, whatever top-k says."""
    model = mixture(experts("llama"), scaling_pass_value=0.5, **SPARSE)
    logits_of(model)
    with model.fixed_scalings([0.5] * 3), torch.no_grad():
        hidden = model.model(tokens()).last_hidden_state
    expected = model.internal_xlora_classifier(hidden)
    assert_close(model.get_latest_scalings(), expected, atol=1e-5, rtol=1e-5)
    model.set_scaling_pass_value(0.0)
    logits_of(model)
    assert far(model.get_latest_scalings(), expected)


def test_none_as_scaling_pass_value_is_one_over_E(experts: Experts) -> None:
    model = mixture(experts("llama"))
    model.set_scaling_pass_value(None)
    got = logits_of(model)
    assert torch.equal(got, logits_of(mixture(experts("llama"), scaling_pass_value=1 / 3)))
    assert far(got, logits_of(mixture(experts("llama"))))
