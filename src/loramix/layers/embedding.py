"""Experts of an embedding.

V, D: entries and width of the embedding. R: total rank of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramix.layers.functional import add_up_projection
from loramix.layers.stack import ExpertStack


class EmbeddingStack(ExpertStack):
    """`(A[x] ∘ columns) Bᵀ`: gated after the lookup, times the embedding's scale where it has one (Gemma).

    A is kept as (V, R), as the lookup reads it. An embedding's input is not dropped.
    """

    adapts = "embedding"
    is_embedding = True
    rank_axes: ClassVar[dict[str, int]] = {"lora_A": 1, "lora_B": 1}

    def _unstack_A(self, stacked: Tensor) -> Sequence[Tensor]:
        return stacked.T.split(self.ranks)

    def _dropped_down(self, x: Tensor, stacked: Tensor, base_layer: nn.Module) -> Tensor:
        return self._down(x, stacked, base_layer)

    def _down(self, x: Tensor, A: Tensor, base_layer: nn.Module) -> Tensor:
        return F.embedding(x, A, cast(nn.Embedding, base_layer).padding_idx)

    def _up(self, y: Tensor, gated: Tensor, B: Tensor, base_layer: nn.Module) -> Tensor:
        scale = getattr(base_layer, "embed_scale", None)
        gated = gated if scale is None else gated * torch.as_tensor(scale, device=gated.device, dtype=gated.dtype)
        return add_up_projection(y, gated, B, in_place=False)
