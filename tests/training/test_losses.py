"""Laws of the router objectives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix.routers.gating import largest
from loramix.training.losses import IGNORED, entropy_floor, load_balance, supervised, z_loss

SHAPE = (2, 5, 3, 4)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


def number(loss: Tensor) -> float:
    return float(loss.detach())


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(SHAPE, requires_grad=True)


@pytest.fixture
def real() -> Tensor:
    return torch.tensor([[True, True, True, False, False], [True] * 5])


def test_the_z_loss_is_that_of_its_paper(logits: Tensor) -> None:
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.reshape(-1, 4).tolist()) / 30
    assert number(z_loss(logits)) == pytest.approx(expected, rel=1e-5)


def test_the_z_loss_pulls_the_partition_sum_to_one(logits: Tensor) -> None:
    step = logits.detach() - 0.5 * gradient(z_loss(logits) * 30, logits)
    assert torch.logsumexp(step, -1).abs().sum() < torch.logsumexp(logits, -1).abs().sum()
    assert number(z_loss(logits - torch.logsumexp(logits, -1, keepdim=True))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_when_even_and_more_when_not(k: int) -> None:
    even = torch.full(SHAPE, 0.25)
    chosen = torch.stack([largest(torch.randn(4), k) for _ in range(30)]).reshape(SHAPE)
    assert number(load_balance(even, chosen)) == pytest.approx(1)
    peaked = torch.zeros(SHAPE).index_fill(-1, torch.tensor([1]), 1.0)
    assert number(load_balance(peaked, peaked.bool())) == pytest.approx(4)


def test_balance_lowers_the_probability_of_the_busiest_expert(logits: Tensor) -> None:
    probabilities = torch.softmax(logits, -1)
    selected = torch.zeros(SHAPE, dtype=torch.bool)
    selected[..., 2] = True
    pushed = gradient(load_balance(probabilities, selected), logits)
    assert (pushed[..., 2] > 0).all()
    assert (pushed[..., [0, 1, 3]] < 0).all()


def test_the_floor_is_silent_above_and_raises_the_entropy_below(logits: Tensor) -> None:
    assert number(entropy_floor(torch.full(SHAPE, 0.25), 1.0)) == pytest.approx(0, abs=1e-6)
    assert number(entropy_floor(torch.softmax(logits, -1), 0.0)) == 0
    peaked = torch.tensor([8.0, 0.0, 0.0, 0.0]).expand(SHAPE).clone().requires_grad_()
    before = entropy_floor(torch.softmax(peaked, -1), 0.9)
    assert 0 < number(before) < 0.9
    moved = peaked.detach() - 50 * gradient(before, peaked)
    assert entropy_floor(torch.softmax(moved, -1), 0.9) < before


def test_the_floor_bounds_the_mean_and_not_the_single_token() -> None:
    certain = torch.eye(4).repeat(2, 1, 1).unsqueeze(2)
    assert number(entropy_floor(certain, 1.0)) == pytest.approx(0, abs=1e-6)


def test_supervision_is_cross_entropy(logits: Tensor) -> None:
    ids = torch.tensor([3, 1])
    rows = [torch.nn.functional.cross_entropy(logits[row].reshape(-1, 4), ids[row].expand(15)) for row in range(2)]
    assert_close(supervised(logits, ids), torch.stack(rows).mean())
    assert_close(supervised(logits, ids.unsqueeze(1).expand(2, 5)), torch.stack(rows).mean())


def test_unknown_experts_are_not_supervised(logits: Tensor) -> None:
    assert_close(supervised(logits, torch.tensor([3, IGNORED])), supervised(logits[:1], torch.tensor([3])))
    nothing = supervised(logits, torch.tensor([IGNORED, IGNORED]))
    assert number(nothing) == 0
    assert not gradient(nothing, logits).any()


LOSSES = {
    "z": lambda z, real: z_loss(z, real),
    "balance": lambda z, real: load_balance(torch.softmax(z, -1), largest(z, 1), real),
    "floor": lambda z, real: entropy_floor(torch.softmax(z, -1), 1.0, real),
    "supervised": lambda z, real: supervised(z, torch.tensor([0, 2]), real),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_nothing_and_gets_no_gradient(loss: str, logits: Tensor, real: Tensor) -> None:
    value = LOSSES[loss](logits, real)
    assert not gradient(value, logits)[0, 3:].any()
    other = torch.where(real[:, :, None, None], logits, torch.randn(SHAPE))
    assert_close(LOSSES[loss](other, real), LOSSES[loss](logits, real))
    spoilt = torch.where(real[:, :, None, None], logits.detach(), torch.nan)
    assert_close(LOSSES[loss](spoilt, real), LOSSES[loss](logits.detach(), real))


@pytest.mark.parametrize("loss", LOSSES)
def test_layers_that_are_alike_count_as_one(loss: str, logits: Tensor, real: Tensor) -> None:
    shared = logits[:, :, :1]
    assert_close(LOSSES[loss](shared.expand(-1, -1, 7, -1), real), LOSSES[loss](shared, real))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_only_padding_gives_a_finite_number(loss: str, logits: Tensor) -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.isfinite(gradient(LOSSES[loss](logits, nothing), logits)).all()
