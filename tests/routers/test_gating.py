"""Logits to scalings: each step against its definition, over any logits and any k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from loramix.routers.gating import Gating, largest


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """(2, L, E), half of the time with zeros and ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (2, draw(st.integers(1, 3)), draw(st.integers(1, 6)))
    if draw(st.booleans()):
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


@settings(max_examples=50)
@given(logits(), st.floats(0.1, 5))
def test_the_softmax_is_over_experts_and_colder_is_sharper(z: Tensor, temperature: float) -> None:
    s = Gating(softmax=True, temperature=temperature).activate(z)
    assert_close(s.sum(-1), torch.ones(z.shape[:-1]))
    assert_close(s, (z / temperature).exp() / (z / temperature).exp().sum(-1, keepdim=True))
    assert torch.equal(Gating(softmax=False, temperature=temperature).activate(z), z)


@settings(max_examples=100)
@given(logits(), st.data())
def test_exactly_k_are_kept_and_none_of_them_is_smaller_than_a_dropped_one(z: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, z.shape[-1]))
    kept = largest(z, k)
    assert (kept.sum(-1) == k).all()
    smallest = z.masked_fill(~kept, torch.inf).amin(-1)
    assert (z.masked_fill(kept, -torch.inf).amax(-1) <= smallest).all()


@settings(max_examples=100)
@given(logits(), st.data())
def test_hard_keeps_values_and_sparse_sums_to_one(z: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, z.shape[-1]))
    kept = largest(z, k)
    hard, sparse = (Gating(top_k=k, renormalise=renormalise).select(z) for renormalise in (False, True))
    assert torch.equal(hard, torch.where(kept, z, torch.zeros(())))
    assert ((sparse > 0) == kept).all()  # also where the kept logit is zero
    assert_close(sparse.sum(-1), torch.ones(z.shape[:-1]))
    weights = z.exp() * kept
    assert_close(sparse, weights / weights.sum(-1, keepdim=True))


@settings(max_examples=25)
@given(logits())
@pytest.mark.parametrize("renormalise", [False, True])
def test_all_selected_is_nothing_selected(renormalise: bool, z: Tensor) -> None:
    every = Gating(top_k=z.shape[-1], renormalise=renormalise).select(z)
    assert torch.equal(every, Gating(top_k=None, renormalise=renormalise).select(z))
    assert torch.equal(every, torch.softmax(z, -1) if renormalise else z)


def test_a_zero_among_the_selected_stays() -> None:
    z = torch.tensor([[[0.0, -1.0, 1.0]]])
    assert torch.equal(Gating(top_k=2, renormalise=True).select(z) > 0, torch.tensor([[[True, False, True]]]))


def test_the_gradient_reaches_the_selected_and_no_others() -> None:
    z = torch.tensor([[[3.0, 1.0, 2.0]]], requires_grad=True)
    (Gating(top_k=2, renormalise=True).select(z)[..., 0]).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad != 0, torch.tensor([[[True, False, True]]]))
    assert z.grad.isfinite().all()
