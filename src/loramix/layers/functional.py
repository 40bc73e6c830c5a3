"""The arithmetic of a mixture layer, fast and slow.

Whatever the number of experts, their A matrices are stacked into one (R, in) and their B matrices into one (out, R):
two matrix products, with the gate between them. Experts of different rank, or absent ones, need no padding.

R: total rank, the sum of the experts' ranks. E: experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SMALL = 2**14  # numbers that one more pass over them costs less than three calls


def gate(low_rank: Float[Tensor, "*tokens R"], columns: Float[Tensor, "*#tokens R"]) -> Float[Tensor, "*tokens R"]:
    """Weigh each rank column of each token: `columns` already holds g · c_e · s[e] for the expert of each column.

    Without gradients `low_rank` is overwritten.
    """
    return low_rank * columns if torch.is_grad_enabled() else low_rank.mul_(columns)


def add_up_projection(
    y: Float[Tensor, "*tokens out"], gated: Float[Tensor, "*tokens R"], B: Float[Tensor, "out R"], *, in_place: bool
) -> Float[Tensor, "*tokens out"]:
    """`y + gated Bᵀ`, as one accumulating product into `y` when it may be overwritten."""
    if in_place and y.dtype == gated.dtype == B.dtype and y.is_contiguous():
        if y.numel() <= SMALL and not torch.is_grad_enabled():
            return y.add_(F.linear(gated, B))  # fewer calls; a token's time is made of them
        y.view(-1, y.shape[-1]).addmm_(gated.reshape(-1, gated.shape[-1]), B.t())
        return y
    return y + F.linear(gated, B).to(y.dtype)


def lora_mixture(
    x: Float[Tensor, "*tokens in"],
    A: Float[Tensor, "R in"],
    B: Float[Tensor, "out R"],
    columns: Float[Tensor, "*#tokens R"],
) -> Float[Tensor, "*tokens out"]:
    """What the experts add to a linear layer: `((x Aᵀ) ∘ columns) Bᵀ`."""
    return F.linear(gate(F.linear(x, A), columns), B)


def lora_mixture_reference(
    x: Float[Tensor, "*tokens in"],
    experts: Sequence[tuple[Tensor, Tensor, float]],
    scalings: Float[Tensor, "*tokens E"],
    global_weight: float = 1.0,
) -> Float[Tensor, "*tokens out"]:
    """The same, as the paper writes it: `g · Σ_e s[e] · c_e · B_e A_e x`, one expert after the other.

    Args:
        x: the layer's input.
        experts: A (r, in), B (out, r) and c = alpha / r of each expert.
        scalings: each token's weight on each expert.
        global_weight: g.
    """
    terms = [s.unsqueeze(-1) * c * (x @ A.T @ B.T) for (A, B, c), s in zip(experts, scalings.unbind(-1), strict=True)]
    return global_weight * torch.stack(terms).sum(0)
