"""Experts of a mixture-of-experts block: one low-rank update for each matrix of its parameters.

    up_n(x) = W_n x + g · Σ_e s[e] · c_e · B_en A_en x          before the block's activation; down_n likewise

for the block's n-th expert and the scalings s of the token x (docs/semantics.md §2).

N: experts of the block. K: those that a token is given to. T: tokens. H: hidden size. R: total rank of a parameter's
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loramix.experts.adapter import BlockWeights, LoraWeights
from loramix.experts.base_layers import expected_shapes
from loramix.experts.blocks import DOWN, BlockForm, BlockMatrices
from loramix.layers.linear import LinearStack
from loramix.layers.routing import Routing
from loramix.layers.stack import fit_tokens


class BlockStack(LinearStack):
    """The experts of one parameter of a block: A as (N, R, in), B as (N, out, R). `mixed` calls `delta`."""

    adapts = "mixture-of-experts block"
    rank_axes: ClassVar[dict[str, int]] = {"lora_A": 1, "lora_B": 2}

    def __init__(self, base_layer: BlockMatrices, *args: Any, **options: Any) -> None:
        self._exchanged = base_layer.exchanged
        super().__init__(base_layer, *args, **options)

    def _shapes(self, base_layer: nn.Module) -> tuple[Sequence[int], Sequence[int]]:
        return expected_shapes(base_layer, self.rank)

    def unstack(self, tensors: Mapping[str, Tensor]) -> dict[int, LoraWeights]:
        downs = self._joined("lora_A", tensors).detach().split(self.ranks, dim=1)
        ups = self._joined("lora_B", tensors).detach().split(self.ranks, dim=2)
        return {
            expert: BlockWeights(A, B, exchanged=self._exchanged)
            for expert, A, B in zip(self.members, downs, ups, strict=True)
        }

    def token_columns(self, routing: Routing, x: Float[Tensor, "T inputs"]) -> Float[Tensor, "*T R"]:
        """What each rank column of each token is multiplied by; (R,) where it is the same for all tokens."""
        like = x.new_empty(len(x), 0, dtype=self.lora_A.dtype)
        return fit_tokens(routing.columns(self, like), like.shape[:1], self.adapts)

    def delta(
        self, x: Float[Tensor, "n inputs"], number: int, columns: Float[Tensor, "*n R"], base_layer: nn.Module
    ) -> Float[Tensor, "n out"]:
        """What the experts add to the block's matrix of this number, for tokens with these columns."""
        low_rank = self._dropped_down(x, self.whole("lora_A")[number], base_layer)
        return F.linear(low_rank * columns, self.whole("lora_B")[number])


Projection = Callable[[Tensor, int, Any], Tensor]
"""(some tokens, the number of the block's expert, which tokens of the call they are) -> the product and the deltas."""


def mixed(
    block: nn.Module,
    form: BlockForm,
    stacks: Mapping[str, Sequence[BlockStack]],
    routing: Routing,
    hidden: Float[Tensor, "*tokens H"],
    chosen: Int[Tensor, "T K"] | None = None,
    weights: Float[Tensor, "T K"] | None = None,
) -> Float[Tensor, "*tokens H"]:
    """The block's output, with the experts in it.

    Args:
        block: the base model's.
        form: how it computes.
        stacks: the experts on its parameters, by name.
        routing: of this pass.
        hidden: the block's tokens; of a dense block, all tokens once for each of its experts.
        chosen: the numbers of the block's experts that each token is given to; N means none.
        weights: how much each of them counts.

    Raises:
        RoutingError: the scalings are those of other tokens.
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    tokens = x[: len(x) // len(getattr(block, DOWN))] if form.dense else x
    up, down = (_projection(block, name, form, stacks.get(name, ()), routing, tokens) for name in form.parameters)

    def expert(part: Tensor, number: int, which: Any) -> Tensor:
        y = down(_activated(block, form, up(part, number, which)), number, which)
        return block.post_expert_norm(y) if form.settings.has_post_expert_norm else y  # pyright: ignore

    if form.dense:
        parts = x.split(len(tokens))
        return torch.cat([expert(part, number, slice(None)) for number, part in enumerate(parts)]).view_as(hidden)
    assert chosen is not None
    assert weights is not None
    count, out = len(getattr(block, DOWN)), torch.zeros_like(x)
    flat, flat_weights = chosen.reshape(-1), weights.reshape(-1, 1)
    places = flat.argsort(stable=True).split(torch.bincount(flat, minlength=count).tolist())
    for number, place in enumerate(places[:count]):
        if len(place):
            which = place // chosen.shape[-1]
            y = expert(x[which], number, which) * flat_weights[place]
            out = out.index_add(0, which, y.to(out.dtype))
    return out.view_as(hidden)


def _projection(
    block: Any, name: str, form: BlockForm, stacks: Sequence[BlockStack], routing: Routing, tokens: Tensor
) -> Projection:
    matrices, biases = getattr(block, name), getattr(block, f"{name}_bias") if form.settings.has_bias else None
    columns = [stack.token_columns(routing, tokens) for stack in stacks]

    def project(x: Tensor, number: int, which: Any) -> Tensor:
        weight = matrices[number].T if form.settings.is_transposed else matrices[number]
        y = F.linear(x, weight, None if biases is None else biases[number])
        for stack, each in zip(stacks, columns, strict=True):
            y = y + stack.delta(x, number, each if each.dim() == 1 else each[which], block).to(y.dtype)
        return y

    return project


def _activated(block: Any, form: BlockForm, y: Tensor) -> Tensor:
    if not form.settings.has_gate:
        return block.act_fn(y)
    if not form.dense:
        return block._apply_gate(y)
    gate, up = y.chunk(2, dim=-1)
    return up * block.act_fn(gate)
