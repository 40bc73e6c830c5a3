"""Modules that keep their own precision when the model around them changes its."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def keep_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`move` as it acts on a tensor that keeps its dtype: `.to(device)` moves it, `.to(dtype)` leaves it alone."""

    def moved(tensor: Tensor) -> Tensor:
        target = move(tensor)
        return target if target.dtype == tensor.dtype else tensor.to(target.device)

    return moved
