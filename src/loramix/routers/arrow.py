"""Arrow: each expert's own direction in the input of each layer; no training, no text.

L: adapted layers. E: experts. R: total rank of a layer; ΣR over the layers. r: rank of an expert in a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loramix.config.xlora import XLoraConfig
from loramix.routers.from_experts import ExpertsRouter
from loramix.routers.router import RouterSizes, Shapes, register_router


@register_router
class ArrowRouter(ExpertsRouter):
    """z_e = |v_e · x|, v_e the first right singular vector of B_e A_e.

    It lies in the rows of A_e: v_e = A_eᵀ w_e, so that z_e = |h_e · w_e|. What it reads of an expert is A and B alone,
    also with DoRA, whose row lengths it leaves out.

    Args:
        sizes: what it is built for.

    Attributes:
        directions: (E, ΣR): w of each expert, 0 at the ranks of the others; one layer after the other.

    Source: Ostapenko et al., arXiv 2405.11157, section 4; PEFT 0.21.2, `tuners/lora/arrow.py`, which iterates 15 times
    where this is exact. PEFT's top-k goes before its softmax: `enable_softmax=False, enable_softmax_topk=True`.
    """

    kind = "arrow"

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__(sizes)
        self._ranks = tuple(map(len, sizes.expert_of_rank))
        self._ends = (0, *accumulate(self._ranks))
        self._expert_of_rank = sizes.expert_of_rank
        self.register_buffer("directions", torch.zeros(sizes.experts, self._ends[-1]))

    directions: Tensor

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        return cls(sizes)

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        ranks = sum(map(len, sizes.expert_of_rank))
        return {"offset": (sizes.layers, sizes.experts), "directions": (sizes.experts, ranks)}

    def layer_logits(self, layer: int, low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens E"]:
        return self.for_pass()(layer, low_rank)

    def for_pass(self) -> Callable[[int, Tensor], Tensor]:
        directions, offset = self.directions.split(self._ranks, dim=1), self.offset.unbind()
        return lambda layer, low_rank: F.linear(low_rank, directions[layer]).abs() + offset[layer]

    def take(self, layer: int, expert: int, A: Float[Tensor, "r n"], B: Float[Tensor, "out r"]) -> None:
        first = self._ends[layer] + self._expert_of_rank[layer].index(expert)
        self.directions[expert, first : first + len(A)] = direction(A, B)


def direction(A: Float[Tensor, "r n"], B: Float[Tensor, "out r"]) -> Float[Tensor, " r"]:
    """w with Aᵀ w = v, the first right singular vector of B A, without making that matrix.

    With B = Q R and Aᵀ = P S, the singular values of B A are those of R Sᵀ = U Σ Vᵀ, and v = (B A)ᵀ Q u / σ, which is
    Aᵀ Rᵀ u / σ.
    """
    up, down = torch.linalg.qr(B.double())[1], torch.linalg.qr(A.double().T)[1]
    left, values, _ = torch.linalg.svd(up @ down.T)
    return (up.T @ left[:, 0] / values[0]).float()
