"""The slot through which scalings reach the layers, and the columns that they become there."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix.errors import LoramixError, RoutingError
from loramix.layers.routing import ConstantRouting, TensorRouting
from loramix.layers.slot import checkpoint_with, current, override, overriding, routed

ONE, TWO = ConstantRouting(1.0), ConstantRouting(2.0)


@dataclass
class FakeStack:
    """Layer `number` with expert 0 at rank 1, c = 2 and expert 2 at rank 2, c = 3."""

    number: int = 0
    rank: int = 3
    layout: int = 0
    expert_of_rank: Tensor = field(default_factory=lambda: torch.tensor([0, 2, 2]))
    rank_scale: Tensor = field(default_factory=lambda: torch.tensor([2.0, 3.0, 3.0]))
    lora_A: Tensor = field(default_factory=lambda: torch.zeros(3, 1))

    @property
    def index(self) -> Tensor:
        return torch.tensor([self.number])


def test_outside_a_pass_there_is_no_routing() -> None:
    with pytest.raises(RoutingError, match="only inside the passes") as caught:
        current()
    assert isinstance(caught.value, LoramixError)


def test_a_pass_fills_the_slot_and_restores_what_was_there() -> None:
    seen: list[object] = []
    routed(ONE, lambda: (seen.append(current()), routed(TWO, lambda: seen.append(current())), seen.append(current())))
    assert seen == [ONE, TWO, ONE]
    with pytest.raises(RoutingError):
        current()


def test_a_pass_that_fails_restores_it_too() -> None:
    def fails() -> None:
        raise KeyError

    def outer() -> object:
        with pytest.raises(KeyError):
            routed(TWO, fails)
        return current()

    assert routed(ONE, outer) is ONE


def test_each_thread_has_a_slot_of_its_own() -> None:
    errors: list[BaseException] = []

    def other() -> None:
        try:
            current()
        except RoutingError as error:
            errors.append(error)

    routed(ONE, lambda: _in_thread(other))
    assert len(errors) == 1


def test_overrides_nest_belong_to_one_owner_and_stay_in_their_thread() -> None:
    mine, others = object(), object()
    seen: list[object] = []

    def one() -> ConstantRouting:
        return ONE

    def two() -> ConstantRouting:
        return TWO

    with override(mine, one), override(others, two):
        assert overriding(mine) is one
        with override(mine, two):
            assert overriding(mine) is two
            _in_thread(lambda: seen.append(overriding(mine)))
        assert overriding(mine) is one
    assert overriding(mine) is None
    assert seen == [None]


@pytest.mark.parametrize("later", [None, TWO], ids=["after the pass", "in another pass"])
def test_a_recomputation_sees_the_routing_of_the_first_run(later: ConstantRouting | None) -> None:
    kept: list[Any] = []
    seen: list[object] = []

    def inner(call: Any, *args: Any) -> None:
        kept.append(call)
        call(*args)

    routed(ONE, checkpoint_with, inner, lambda: seen.append(current()))
    routed(later, kept[0]) if later else kept[0]()
    assert seen == [ONE, ONE]


def test_a_checkpoint_outside_a_pass_is_a_plain_one() -> None:
    assert checkpoint_with(lambda call, x: call(x), lambda x: x + 1, 1) == 2


def test_constant_columns_are_the_value_times_each_scale() -> None:
    stack = FakeStack()
    assert torch.equal(ConstantRouting(0.5).columns(stack, torch.zeros(1)), torch.tensor([1.0, 1.5, 1.5]))
    assert ConstantRouting(0.5).columns(stack, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(ConstantRouting(0.5).experts(stack, torch.tensor([2]), torch.zeros(1)), torch.tensor([0.5]))
    assert ConstantRouting(0.0).silent
    assert not ConstantRouting(0.5).silent


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("tokens", [(), (2, 3)], ids=["all tokens alike", "tokens of their own"])
def test_columns_are_weight_times_scale_times_scaling(tokens: tuple[int, ...], layers: int, weight: float) -> None:
    s = torch.randn(*tokens, layers, 3)
    stack = FakeStack(number=3)
    own = s[..., 3 if layers == 4 else 0, :]
    expected = weight * torch.stack([2 * own[..., 0], 3 * own[..., 2], 3 * own[..., 2]], -1)
    for layouts in ([], [stack]):
        routing = TensorRouting(s, weight, layouts)
        assert_close(routing.columns(stack, torch.zeros(1)), expected)
        assert_close(routing.experts(stack, torch.tensor([2, 0]), torch.zeros(1)), weight * own[..., [2, 0]])
        assert routing.columns(stack, torch.zeros(1, dtype=torch.float16)).dtype == torch.float16


def test_layers_of_one_layout_share_their_columns() -> None:
    stack, other = FakeStack(number=0), FakeStack(number=1, layout=1, rank_scale=torch.ones(3))
    routing = TensorRouting(torch.randn(2, 3, 1, 3), 1.0, [stack, other])
    low_rank = torch.zeros(1)
    assert routing.columns(stack, low_rank) is routing.columns(FakeStack(number=2), low_rank)
    assert not torch.equal(routing.columns(other, low_rank), routing.columns(stack, low_rank))


def _in_thread(call: Any) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
