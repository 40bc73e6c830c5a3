"""The settings that the other tests rely on are in force, in every worker."""

from __future__ import annotations

import warnings

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import shape_checker
from loramix.routers.gating import Gating


def test_shapes_in_signatures_are_executed() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="activate"):
        Gating().activate(torch.zeros(3))


@shape_checker.jaxtyped(typechecker=shape_checker.check)
def product(x: Float[Tensor, "N K"], y: Float[Tensor, "K M"], rows: int | None = None) -> Float[Tensor, "N M"]:
    """The product of the first rows: of fewer than all, its own annotation is wrong."""
    return inner(x[:rows], y)


@shape_checker.jaxtyped(typechecker=shape_checker.check)
def inner(x: Float[Tensor, "M N"], y: Float[Tensor, "N K"]) -> Float[Tensor, "M K"]:
    return x @ y


def test_a_letter_is_one_size_in_a_call_and_belongs_to_that_call() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert product(torch.ones(5, 6), torch.ones(6, 7)).shape == (5, 7)
    for x, y, rows in ((torch.ones(2, 3), torch.ones(2, 4), None), (torch.ones(2, 3), torch.ones(3, 4), 1)):
        with pytest.raises(jaxtyping.TypeCheckError, match="product"):
            product(x, y, rows)
    with pytest.raises(jaxtyping.TypeCheckError, match="product"):
        product(torch.ones(2, 3), torch.ones(3, 4), "1")


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="told"):
        warnings.warn("told", stacklevel=1)
