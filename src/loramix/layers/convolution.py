"""Experts of a convolution.

B: batch. R: total rank of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from loramix.layers.stack import ExpertStack, LayerExpert


class ConvolutionStack(ExpertStack):
    """The low-rank activation (B, R, *positions) is gated; its positions are the tokens."""

    adapts = "convolution"

    def __init__(self, base_layer: _ConvNd, experts: Sequence[LayerExpert], number: int, **options: Any) -> None:
        self._kernel_dims = len(base_layer.kernel_size)
        super().__init__(base_layer, experts, number, **options)

    def _file_B(self, B: Tensor) -> Tensor:
        return B.reshape(*B.shape, *[1] * self._kernel_dims)

    def _down(self, x: Tensor, A: Tensor, base_layer: nn.Module) -> Tensor:
        base = cast(_ConvNd, base_layer)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[self._kernel_dims - 1]
        return convolve(x, A, None, base.stride, base.padding)

    @property
    def _rank_dim(self) -> int:
        return -1 - self._kernel_dims

    def _tokens_last(self, h: Tensor) -> Tensor:
        return h.flatten(-self._kernel_dims).movedim(-2, -1)

    def _up(self, y: Tensor, gated: Tensor, B: Tensor, base_layer: nn.Module) -> Tensor:
        return y + F.linear(gated, B).movedim(-1, -2).reshape(y.shape).to(y.dtype)
