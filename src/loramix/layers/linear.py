"""Experts of a linear layer: `nn.Linear`, transformers' `Conv1D`, or a quantised one of the same interface.

R: total rank of the layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramix.layers.functional import add_up_projection
from loramix.layers.fused import add_mixture, expand, shrink, usable
from loramix.layers.routing import Routing
from loramix.layers.stack import ExpertStack, fit_tokens, has_hooks


class LinearStack(ExpertStack):
    """`((x Aᵀ) ∘ columns) Bᵀ`. Without gradients it is added to y itself, on a GPU by kernels (`fused`)."""

    adapts = "linear layer"

    def add_to(self, y: Tensor, x: Tensor, routing: Routing, base_layer: nn.Module, base_y: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self._is_plain(base_layer):
            return super().add_to(y, x, routing, base_layer, base_y)
        down, up = self.whole("lora_A"), self.whole("lora_B")
        if x.is_cuda and usable(y, x, down, up):
            return self.add_fused(y, x, routing)
        if x.dtype != down.dtype:
            return super().add_to(y, x, routing, base_layer, base_y)
        gathered = routing.gathered(self)
        if gathered is not None:
            down, up = down.index_select(0, gathered.ranks), up.index_select(1, gathered.ranks)
        low_rank = F.linear(x, down)
        columns = routing.columns(self, low_rank) if gathered is None else gathered.columns
        if columns.shape != low_rank.shape:
            columns = fit_tokens(columns, low_rank.shape[:-1], self.adapts)
        return add_up_projection(y, low_rank.mul_(columns), up, in_place=True)

    def add_fused(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """`y + Δ(x)` into y itself, for a stack that is plain.

        Two launches with a routing that is known before the layer runs; with one that reads the low-rank activation,
        shrink, route, gate and expand.
        """
        if not routing.reads_low_rank:
            columns = fit_tokens(routing.columns(self, x), x.shape[:-1], self.adapts)
            return add_mixture(y, x, self.whole("lora_A"), columns, self.whole("lora_B"))
        h = shrink(x, self.whole("lora_A"))
        return expand(y, h.mul_(fit_tokens(routing.columns(self, h), h.shape[:-1], self.adapts)), self.whole("lora_B"))

    def _is_plain(self, base_layer: nn.Module) -> bool:
        """Whether the delta is two matrix products, without dropout or biases, and nothing else refers to y."""
        return not (self.biased or (self.training and any(self.dropouts)) or has_hooks(base_layer))

    def _down(self, x: Tensor, A: Tensor, base_layer: nn.Module) -> Tensor:
        return F.linear(x, A)

    def _up(self, y: Tensor, gated: Tensor, B: Tensor, base_layer: nn.Module) -> Tensor:
        fresh = not torch.is_grad_enabled() or type(base_layer) is nn.Linear
        return add_up_projection(y, gated, B, in_place=fresh and not has_hooks(base_layer))
