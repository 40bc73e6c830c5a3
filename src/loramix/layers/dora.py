"""DoRA: experts of a linear layer that also change the length of the weight's rows (arXiv 2402.09353, section 4).

R: total rank of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramix.experts.base_layers import dense_weight
from loramix.layers.functional import gate
from loramix.layers.linear import LinearStack
from loramix.layers.routing import Routing
from loramix.layers.stack import LayerExpert, MergedMatrices, fit_tokens


class DoraStack(LinearStack):
    """An expert with magnitude m and norm n = ‖W + c B A‖, per output row, adds

        s · ((m/n − 1) (base(x) − bias) + (m/n) c B A x)

    (docs/semantics.md §2). Experts without a magnitude may lie in the same stack. Without training n is fixed when the
    expert is loaded.

    Attributes:
        lora_magnitude: (experts with DoRA, out).
        dora: which parts have a magnitude.
    """

    rank_axes: ClassVar[dict[str, int]] = {**LinearStack.rank_axes, "lora_magnitude": 0}

    def __init__(self, base_layer: nn.Module, experts: Sequence[LayerExpert], number: int, **options: Any) -> None:
        super().__init__(base_layer, experts, number, **options)
        self.dora = tuple(i for i, e in enumerate(experts) if e.weights.magnitude is not None)
        empty = self.lora_B.new_empty(len(self.dora), len(self.lora_B))
        self.lora_magnitude = nn.Parameter(empty, requires_grad=False)
        parts = [i for i, rank in enumerate(self.ranks) for _ in range(rank)] + list(self.biased)
        device = self.lora_A.device
        self._buffer("dora_parts", torch.tensor(self.dora, device=device))
        self._buffer("dora_experts", torch.tensor([self.members[i] for i in self.dora], device=device))
        self._buffer("part_of_rank", torch.tensor(parts, device=device))
        self._dora_scales = tuple(experts[i].scale for i in self.dora)
        self._buffer("dora_norm", torch.empty_like(empty))
        self._norm_is_stale = True

    dora_parts: Tensor
    dora_experts: Tensor
    part_of_rank: Tensor
    dora_norm: Tensor

    def settle(self, base_layer: nn.Module) -> None:
        self.dora_norm, self._norm_is_stale = self._norms(base_layer), False

    def add_to(self, y: Tensor, x: Tensor, routing: Routing, base_layer: nn.Module, base_y: Tensor) -> Tensor:
        ratio = self._ratio(base_layer)
        h = self._low_rank(x, base_layer)
        scalings = fit_tokens(routing.experts(self, self.dora_experts, h), h.shape[:-1], self.adapts)
        columns = fit_tokens(routing.columns(self, h), h.shape[:-1], self.adapts)
        bias = getattr(base_layer, "bias", None)
        unbiased = base_y if bias is None else base_y - bias
        gain = (scalings.to(ratio.dtype) @ (ratio - 1)).to(y.dtype) * unbiased
        return y + gain + F.linear(gate(h, columns), self.whole("lora_B") * self._column_ratios(ratio)).to(y.dtype)

    def update_matrices(self, routing: Routing, base_layer: nn.Module) -> MergedMatrices:
        ratio = self._ratio(base_layer).float()
        up = self.whole("lora_B").float()
        stretch = routing.experts(self, self.dora_experts, up).float() @ (ratio - 1)
        return MergedMatrices(up * routing.columns(self, up) * self._column_ratios(ratio), stretch)

    def _ratio(self, base_layer: nn.Module) -> Tensor:
        """m / n: (experts with DoRA, out). The norm follows experts that are trained."""
        if self.lora_A.requires_grad:
            self._norm_is_stale = True
            return self.whole("lora_magnitude") / self._norms(base_layer)
        if self._norm_is_stale:
            self.settle(base_layer)
        return self.whole("lora_magnitude") / self.dora_norm

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._norm_is_stale = True

    def _column_ratios(self, ratio: Tensor) -> Tensor:
        """(out, R): m / n of the expert of each rank column, 1 where it has none; `ratio` as `_ratio` gives it."""
        every = ratio.new_ones(len(self.ranks), ratio.shape[1]).index_copy(0, self.dora_parts, ratio)
        return every.index_select(0, self.part_of_rank).T

    @torch.no_grad()
    def _norms(self, base_layer: nn.Module) -> Tensor:
        """n: (experts with DoRA, out)."""
        weight = dense_weight(base_layer)
        down, up = self.whole("lora_A"), self.whole("lora_B")
        downs, ups = down.split(self.ranks), up[:, : self.rank].split(self.ranks, dim=1)
        norms = [
            torch.linalg.vector_norm(weight + c * (ups[i].float() @ downs[i].float()), dim=1)
            for i, c in zip(self.dora, self._dora_scales, strict=True)
        ]
        return torch.stack(norms).to(self.lora_A.dtype)

    def _parts_of_columns(self) -> dict[str, list[int]]:
        return {**super()._parts_of_columns(), "lora_magnitude": list(self.dora)}

    def _magnitudes(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        return dict(zip(self.dora, self._joined("lora_magnitude", tensors).detach().unbind(0), strict=True))
