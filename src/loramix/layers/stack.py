"""The delta of one layer: its experts' matrices, stacked.

    Δ(x) = g · Σ_e s[e] · c_e · B_e A_e dropout(x)                                (docs/semantics.md §2)

Each kind of base layer (`linear`, `embedding`, `convolution`) and each variant of LoRA with more than two matrices
(`dora`) has a subclass in a file of its own; `layer.stack_class` chooses among them.

R: total rank of the layer, the sum of its experts' ranks; each LoRA bias adds one column. E: experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramix.errors import RoutingError
from loramix.experts.adapter import LoraWeights
from loramix.experts.base_layers import device_of, expected_shapes
from loramix.layers.functional import gate
from loramix.layers.routing import Routing
from loramix.routers.precision import keep_dtype


class LayerExpert(NamedTuple):
    """One expert's part in one layer.

    Args:
        expert: the expert's number in the mixture.
        weights: its tensors, as the file holds them.
        scale: c_e, alpha / r or alpha / sqrt(r).
        dropout: the dropout probability of its input in training.
    """

    expert: int
    weights: LoraWeights
    scale: float
    dropout: float

    @property
    def rank(self) -> int:
        """r, by the shape of A."""
        return self.weights.rank


class ExpertStack(nn.Module):
    """The experts of one mixture in one layer, stacked: two matrix products for any number of experts.

    A LoRA bias is one more rank column, whose activation is 1. It is gated like its expert's other columns.

    Args:
        base_layer: the adapted layer. It is not stored: `add_to` is given it at each call.
        experts: those that adapt the layer, in the order of the mixture; at least one. Their tensors are yet to be
            moved into `parts`; then `settle` is to be called.
        number: the layer's number among the adapted layers.
        dtype: of the stacked matrices; of the first expert's tensors if None.

    Attributes:
        members: the expert of each part.
        ranks, dropouts: of each part.
        rank: R without the columns of biases.
        biased: which parts have a LoRA bias.
        arrangement: expert, rank, scale and bias of each part; the rank columns follow from it.
        layout: the number of the arrangement; layers of a model with the same arrangement have the same number.
        lora_A: the down projections, stacked by rank.
        lora_B: the up projections, stacked by rank, then one column for each LoRA bias.

    Where some parts train beside frozen ones (`divide`), these two hold those that train, and `frozen_A` and `frozen_B`
    the others; `whole` has all of them in their order.
    """

    adapts: ClassVar[str]
    is_embedding: ClassVar[bool] = False
    rank_axes: ClassVar[dict[str, int]] = {"lora_A": 0, "lora_B": 1}
    """The axis of the parts in each of the matrices."""

    def __init__(
        self,
        base_layer: nn.Module,
        experts: Sequence[LayerExpert],
        number: int,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.number = number
        self.layout = 0
        self.members = tuple(e.expert for e in experts)
        self.ranks = tuple(e.rank for e in experts)
        self.rank = sum(self.ranks)
        self.dropouts = tuple(e.dropout for e in experts)
        self.biased = tuple(i for i, e in enumerate(experts) if e.weights.bias is not None)
        self.arrangement = tuple((e.expert, e.rank, e.scale, i in self.biased) for i, e in enumerate(experts))
        device, dtype = device_of(base_layer), dtype or experts[0].weights.A.dtype

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        shape_A, shape_B = self._shapes(base_layer)
        self.lora_A, self.lora_B = empty(*shape_A), empty(*shape_B)
        columns = [i for i, rank in enumerate(self.ranks) for _ in range(rank)] + list(self.biased)
        scales = [experts[i].scale for i in columns]
        self._columns: dict[str, int] = {}  # of a divided matrix, all of them
        self._kept: tuple[str, ...] = ()  # parameters that do not train with the others
        self._buffer("index", torch.tensor([number], device=device))
        self._buffer("expert_of_rank", torch.tensor([self.members[i] for i in columns], device=device))
        self._buffer("rank_scale", torch.tensor(scales, dtype=torch.float32, device=device))

    def _shapes(self, base_layer: nn.Module) -> tuple[Sequence[int], Sequence[int]]:
        """The shapes of the stacked matrices."""
        shape_A, shape_B = expected_shapes(base_layer, self.rank)
        return shape_A[::-1] if self.is_embedding else shape_A, (shape_B[0], self.rank + len(self.biased))

    def _buffer(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    index: Tensor
    expert_of_rank: Tensor
    rank_scale: Tensor

    def add_to(self, y: Tensor, x: Tensor, routing: Routing, base_layer: nn.Module, base_y: Tensor) -> Tensor:
        """`y + Δ(x)`. It may be computed in place, in y, if no other code can refer to y.

        Args:
            y: the tensor to add the delta to.
            x: the layer's input.
            routing: of this pass.
            base_layer: the adapted layer.
            base_y: the base layer's output for x; y itself, unless another stack has added its delta.

        Raises:
            RoutingError: the scalings are those of other tokens.
        """
        return self._up(y, self._gated(x, routing, base_layer), self.whole("lora_B"), base_layer)

    def _gated(self, x: Tensor, routing: Routing, base_layer: nn.Module) -> Tensor:
        """The low-rank activation (*tokens, R), each column multiplied by g · s[e] · c_e of its expert."""
        h = self._low_rank(x, base_layer)
        return gate(h, fit_tokens(routing.columns(self, h), h.shape[:-1], self.adapts))

    def _low_rank(self, x: Tensor, base_layer: nn.Module) -> Tensor:
        """h = A dropout(x), with a 1 for each LoRA bias: (*tokens, R)."""
        h = self._tokens_last(self._dropped_down(x, self.whole("lora_A"), base_layer))
        return torch.cat([h, h.new_ones(*h.shape[:-1], len(self.biased))], dim=-1) if self.biased else h

    def _dropped_down(self, x: Tensor, stacked: Tensor, base_layer: nn.Module) -> Tensor:
        x = self._input(x, stacked.dtype)
        if not self.training or not any(self.dropouts):
            return self._down(x, stacked, base_layer)
        if len(set(self.dropouts)) == 1:
            return self._down(F.dropout(x, self.dropouts[0]), stacked, base_layer)
        parts = zip(self.dropouts, stacked.split(self.ranks), strict=True)
        return torch.cat([self._down(F.dropout(x, p), A, base_layer) for p, A in parts], dim=self._rank_dim)

    def _input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    @property
    def _rank_dim(self) -> int:
        """The dimension of `_down`'s result that counts rank columns."""
        return -1

    def _tokens_last(self, h: Tensor) -> Tensor:
        """`_down`'s result as (*tokens, R)."""
        return h

    def _unstack_A(self, stacked: Tensor) -> Sequence[Tensor]:
        """Each expert's A as its file holds it: views."""
        return stacked.split(self.ranks)

    @abstractmethod
    def _down(self, x: Tensor, A: Tensor, base_layer: nn.Module) -> Tensor: ...

    @abstractmethod
    def _up(self, y: Tensor, gated: Tensor, B: Tensor, base_layer: nn.Module) -> Tensor: ...

    def _file_B(self, B: Tensor) -> Tensor:
        """One expert's B (out, r) in the shape that it has in a file: a view."""
        return B

    def divide(self, training: Collection[int]) -> None:
        """Let the parts of these experts train alone: the others get parameters of their own, which no optimizer sees.

        Args:
            training: numbers of experts; all of them, or none, divide nothing.
        """
        trains = [expert in training for expert in self.members]
        if all(trains) or not any(trains):
            return
        for name, parts in self._parts_of_columns().items():
            axis, matrix = self.rank_axes[name], cast(nn.Parameter, getattr(self, name))
            new = [i for i, part in enumerate(parts) if trains[part]]
            kept = [i for i, part in enumerate(parts) if not trains[part]]
            if not new:
                self._kept += (name,)
            if not new or not kept:
                continue
            self._kept += (_frozen(name),)
            for place, columns in ((name, new), (_frozen(name), kept)):
                own = matrix.detach().index_select(axis, torch.tensor(columns, device=matrix.device))
                self.register_parameter(place, nn.Parameter(own, requires_grad=matrix.requires_grad))
            self._columns[name] = len(parts)
            order = [*kept, *new]
            if order != sorted(order):
                places = [order.index(i) for i in range(len(order))]
                self._buffer(_order(name), torch.tensor(places, device=matrix.device))

    def _parts_of_columns(self) -> dict[str, list[int]]:
        """The part that each column belongs to, of each of the matrices."""
        columns = [i for i, rank in enumerate(self.ranks) for _ in range(rank)]
        return {"lora_A": columns, "lora_B": [*columns, *self.biased]}

    def places(self, name: str) -> tuple[str, ...]:
        """The parameters that hold a matrix: two, of a divided one."""
        return (name, _frozen(name)) if name in self._columns else (name,)

    def whole(self, name: str) -> Tensor:
        """A matrix of all parts, in their order; a divided one is joined, with gradients for those that train."""
        parameters = cast("dict[str, Tensor]", self._parameters)  # as attributes they are looked for, each time
        return parameters[name] if name not in self._columns else self._joined(name, parameters)

    def _joined(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        own, axis = tensors[name], self.rank_axes[name]
        if name not in self._columns or own.shape[axis] == self._columns[name]:
            return own
        both = torch.cat([tensors[_frozen(name)].to(own), own], axis)
        order = self._buffers.get(_order(name))
        return both if order is None else both.index_select(axis, order.to(own.device))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether the experts train; the frozen ones of a divided stack do not."""
        super().requires_grad_(requires_grad)
        for name in self._kept:
            self.get_parameter(name).requires_grad_(False)
        return self

    @property
    def parts(self) -> dict[int, LoraWeights]:
        """Each expert's tensors as its file holds them, by expert number: views of the matrices, until `divide`."""
        return self.unstack(cast("dict[str, Tensor]", self._parameters))

    def settle(self, base_layer: nn.Module) -> None:
        """Compute what follows from the experts' tensors, once they are in the matrices; nothing here."""

    def unstack(self, tensors: Mapping[str, Tensor]) -> dict[int, LoraWeights]:
        """The experts' tensors as their files hold them, by expert number.

        Args:
            tensors: this stack's parameters by name; of sharded parameters the whole tensors.
        """
        downs = self._unstack_A(self._joined("lora_A", tensors).detach())
        stacked = self._joined("lora_B", tensors).detach()
        ups = stacked[:, : self.rank].split(self.ranks, dim=1)
        biases = dict(zip(self.biased, stacked[:, self.rank :].unbind(1), strict=True))
        magnitudes = self._magnitudes(tensors)
        return {
            expert: LoraWeights(A, self._file_B(B), biases.get(i), magnitudes.get(i), self.is_embedding)
            for i, (expert, A, B) in enumerate(zip(self.members, downs, ups, strict=True))
        }

    def _magnitudes(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """DoRA's magnitudes by part; none here."""
        return {}

    def update_matrices(self, routing: Routing, base_layer: nn.Module) -> MergedMatrices:
        """The update of the layer's weight, for scalings that are the same for every token.

        Args:
            routing: one whose columns are (R,).
            base_layer: the adapted layer.
        """
        up = self.whole("lora_B").float()
        return MergedMatrices(up * routing.columns(self, up), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Frozen matrices take the model's dtype; trainable matrices, gradients and scales stay float32."""
        kept = keep_dtype(fn)
        pinned = [self.rank_scale, *(parameter.grad for parameter in self.parameters(recurse=False))]
        pinned += [self.get_parameter(name) for name in self._kept]  # they are joined with those that train

        def own(tensor: Tensor) -> Tensor:
            precise = tensor.requires_grad or any(tensor is other for other in pinned)
            return kept(tensor) if precise else fn(tensor)

        return super()._apply(own, recurse)

    def extra_repr(self) -> str:
        return f"number={self.number}, experts={self.members}, ranks={self.ranks}"


def _frozen(name: str) -> str:
    return name.replace("lora", "frozen")


def _order(name: str) -> str:
    return name.replace("lora", "order")


class MergedMatrices(NamedTuple):
    """The update of a layer whose scalings are fixed: W' = W + diag(stretch) W + up · A, b' = b + the biases' columns.

    Attributes:
        up: (out, R): B, each column multiplied by all of its factors.
        stretch: (out,): the multiple of each row of W that DoRA adds to it; None without DoRA.
    """

    up: Tensor
    stretch: Tensor | None


def fit_tokens(columns: Tensor, tokens: torch.Size, layer: str) -> Tensor:
    """Columns (B, S, R) for tokens (B, S), (B, 1, S), or (B · S,) if the block has flattened them.

    Columns (R,) fit any tokens.

    Raises:
        RoutingError: the scalings are those of other tokens.
    """
    if columns.dim() == 1 or columns.shape[:-1] == tokens:
        return columns
    if len(tokens) == 1 and columns.shape[:-1].numel() == tokens[0]:
        return columns.flatten(0, -2)
    if columns.dim() == 3 and tokens == (columns.shape[0], 1, columns.shape[1]):
        return columns.unsqueeze(1)
    raise RoutingError(
        "A layer's input must hold the tokens that the scalings were made for, in their order.",
        received=f"scalings for tokens {tuple(columns.shape[:-1])} at a {layer} with input tokens {tuple(tokens)}",
        remedy="do not adapt layers that see other tokens than the backbone (position embeddings, poolers, "
        "sparsely dispatched expert blocks)",
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook, of this module or of all modules, may keep the module's output."""
    own: Any = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks  # pyright: ignore
    return bool(own) or bool(nn.modules.module._has_any_global_hook())  # pyright: ignore
