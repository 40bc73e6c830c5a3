"""The fast mixture equals the slow one: any shapes, any ranks, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from loramix.layers.functional import add_up_projection, gate, lora_mixture, lora_mixture_reference

Expert = tuple[Tensor, Tensor, float]
sizes = st.integers(1, 6)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[Expert], Tensor, float]:
    """x (B, S, in), experts of ranks of their own, scalings (B, S, E), and a global weight; float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, length, inputs, outputs = (draw(sizes) for _ in range(4))
    ranks = draw(st.lists(sizes, min_size=1, max_size=5))
    experts = [(normal(r, inputs), normal(outputs, r), draw(st.sampled_from([0.0, 0.5, 1.0, -2.0]))) for r in ranks]
    return normal(rows, length, inputs), experts, normal(rows, length, len(ranks)), draw(st.floats(-2, 2))


def columns_of(experts: list[Expert], scalings: Tensor, weight: float) -> Tensor:
    repeats = torch.tensor([len(A) for A, _, _ in experts])
    scales = torch.tensor([weight * c for _, _, c in experts], dtype=scalings.dtype)
    return (scalings * scales).repeat_interleave(repeats, dim=-1)


def stacked(experts: list[Expert]) -> tuple[Tensor, Tensor]:
    return torch.cat([A for A, _, _ in experts]), torch.cat([B for _, B, _ in experts], dim=1)


@settings(max_examples=60)
@given(problems())
def test_fast_equals_slow(problem: tuple[Tensor, list[Expert], Tensor, float]) -> None:
    x, experts, scalings, weight = problem
    A, B = stacked(experts)
    expected = lora_mixture_reference(x, experts, scalings, weight)
    assert_close(lora_mixture(x, A, B, columns_of(experts, scalings, weight)), expected)
    with torch.no_grad():
        assert_close(lora_mixture(x, A, B, columns_of(experts, scalings, weight)), expected)


@settings(max_examples=25)
@given(problems())
def test_gradients_of_fast_equal_those_of_slow(problem: tuple[Tensor, list[Expert], Tensor, float]) -> None:
    x, experts, scalings, weight = problem
    leaves = [t.requires_grad_() for t in (x, scalings, *(t for A, B, _ in experts for t in (A, B)))]
    fast = lora_mixture(x, *stacked(experts), columns_of(experts, scalings, weight))
    slow = lora_mixture_reference(x, experts, scalings, weight)
    towards = torch.linspace(-1, 1, fast.numel(), dtype=fast.dtype).view_as(fast)
    for one, other in zip(
        torch.autograd.grad(fast, leaves, towards), torch.autograd.grad(slow, leaves, towards), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)], ids=["one for all tokens", "one for each token"])
def test_the_gate_overwrites_its_input_only_without_gradients(shape: tuple[int, ...]) -> None:
    low_rank, columns = torch.ones(2, 3, 4), torch.full(shape, 2.0)
    assert torch.equal(gate(low_rank, columns), torch.full((2, 3, 4), 2.0))
    assert torch.equal(low_rank, torch.ones(2, 3, 4))
    with torch.no_grad():
        assert gate(low_rank, columns) is low_rank
    assert torch.equal(low_rank, torch.full((2, 3, 4), 2.0))


@pytest.mark.parametrize(
    ("y", "in_place", "overwritten"),
    [
        (torch.zeros(2, 3, 5), True, True),
        (torch.zeros(2, 3, 5), False, False),
        (torch.zeros(2, 5, 3).transpose(1, 2), True, False),
        (torch.zeros(2, 3, 5, dtype=torch.bfloat16), True, False),
    ],
    ids=["allowed", "not allowed", "not contiguous", "another dtype"],
)
def test_the_up_projection_overwrites_y_only_where_it_can(y: Tensor, in_place: bool, overwritten: bool) -> None:
    gated, B = torch.randn(2, 3, 4), torch.randn(5, 4)
    out = add_up_projection(y, gated, B, in_place=in_place)
    assert (out is y) == overwritten
    assert out.dtype == y.dtype
    assert_close(out, (gated @ B.T).to(y.dtype))
    assert bool(y.any()) == overwritten


def test_an_overwritten_y_passes_its_gradients_on() -> None:
    x, W, gated, B = (torch.randn(*shape, requires_grad=True) for shape in ((3, 2), (5, 2), (3, 4), (5, 4)))
    gradients: list[Any] = []
    for in_place in (True, False):
        out = add_up_projection(torch.nn.functional.linear(x, W), gated, B, in_place=in_place)
        gradients.append(torch.autograd.grad(out.square().sum(), (x, W, gated, B)))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


def test_a_scaling_for_each_expert_is_needed() -> None:
    expert = (torch.ones(1, 2), torch.ones(2, 1), 1.0)
    with pytest.raises(ValueError, match="zip"):
        lora_mixture_reference(torch.ones(1, 2), [expert], torch.ones(1, 2))
