"""The adapted layers: what stood there before, as a black box, plus what the experts add to it.

    y = base(x) + g · Σ_e s[e] · c_e · B_e A_e dropout(x)                                (SEMANTICS §2)

Only the sizes of the base layer are read, never its `weight.shape`, so that quantised layers work.

R: total rank of the layer, the sum of its experts' ranks. E: experts. B, S: batch, sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from loramix.errors import RoutingError
from loramix.experts.adapter import LoraWeights
from loramix.experts.base_layers import dense_weight, device_of, kind_of
from loramix.layers.functional import add_up_projection, gate
from loramix.layers.fused import add_mixture, usable
from loramix.layers.scalings import Routing, current
from loramix.routers.classifier import keep_dtype


class Resident(NamedTuple):
    """One expert's part in one layer.

    Args:
        expert: the expert's number in the mixture.
        weights: its tensors, as the file holds them.
        scale: c_e, alpha / r or alpha / sqrt(r).
        dropout: the probability with which its input is dropped in training.
    """

    expert: int
    weights: LoraWeights
    scale: float
    dropout: float

    @property
    def rank(self) -> int:
        return self.weights.A.shape[0]


class XLoraLayer(nn.Module):
    """A layer of the base model and, stacked, the experts that adapt it.

    A LoRA bias is one more rank column, whose activation is 1: it is gated with its expert as every column is.

    Args:
        base_layer: the layer that is adapted; called as it is.
        residents: the experts here, in the order of the mixture; at least one.
        number: the layer's number among the adapted layers.
        dtype: of the stacked matrices; of the residents' tensors if None.

    Attributes:
        arrangement: expert, rank, scale and bias of each resident: what the layer's rank columns follow from.
        layout: the number that all layers of this arrangement have in their model.
        lora_A: the down projections, stacked by rank.
        lora_B: the up projections, stacked by rank, then one column for each LoRA bias.
    """

    adapts: ClassVar[str]
    is_embedding: ClassVar[bool] = False

    def __init__(
        self,
        base_layer: nn.Module,
        residents: Sequence[Resident],
        number: int,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.number = number
        self.ranks = tuple(r.rank for r in residents)
        self.dropouts = tuple(r.dropout for r in residents)
        self.members = tuple(r.expert for r in residents)
        biased = [i for i, r in enumerate(residents) if r.weights.bias is not None]
        self.biased = tuple(biased)
        columns = [i for i, rank in enumerate(self.ranks) for _ in range(rank)] + biased
        self.arrangement = tuple((r.expert, r.rank, r.scale, i in biased) for i, r in enumerate(residents))
        self.layout = 0
        device = device_of(base_layer)

        def place(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.to(device, dtype or tensor.dtype).contiguous(), requires_grad=False)

        self.lora_A = place(self._stack_A([r.weights.A for r in residents]))
        ups = [self._matrix(r.weights.B) for r in residents]
        biases = [b.unsqueeze(1) for i in biased if (b := residents[i].weights.bias) is not None]
        self.lora_B = place(torch.cat([*ups, *biases], dim=1))
        self._buffer("index", torch.tensor([number], device=device))
        self._buffer("expert_of_rank", torch.tensor([residents[i].expert for i in columns], device=device))
        scales = [residents[i].scale for i in columns]
        self._buffer("rank_scale", torch.tensor(scales, dtype=torch.float32, device=device))

    def _buffer(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    index: Tensor
    expert_of_rank: Tensor
    rank_scale: Tensor

    @property
    def weight(self) -> Any:
        """The base layer's weight, for code of the base model that looks at it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias, likewise."""
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the gated experts.

        Raises:
            RoutingError: outside the passes of the model, or with scalings of other tokens.
        """
        routing = current()
        base = cast(nn.Module, self._modules["base_layer"])  # as an attribute it is looked for, each time
        y: Tensor = base(x, *args, **kwargs)
        return y if routing.silent else self._add_experts(y, x, routing)

    def _add_experts(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        return self._up(y, self._gated(x, routing), self.lora_B)

    def _gated(self, x: Tensor, routing: Routing) -> Tensor:
        h = self._tokens_last(self._low_rank(x))
        return gate(h, fit_tokens(routing.columns(self, h), h.shape[:-1], self.adapts))

    def _low_rank(self, x: Tensor) -> Tensor:
        h = self._dropped_down(x)
        if not self.biased:
            return h
        one = h.new_ones(()).expand(*h.shape[: self._rank_dim(h)], len(self.biased), *h.shape[self._rank_dim(h) + 1 :])
        return torch.cat([h, one], dim=self._rank_dim(h))

    def _dropped_down(self, x: Tensor) -> Tensor:
        stacked = self.lora_A
        x = self._input(x, stacked.dtype)
        if not self.training or not any(self.dropouts):
            return self._down(x, stacked)
        if len(set(self.dropouts)) == 1:
            return self._down(F.dropout(x, self.dropouts[0]), stacked)
        parts = zip(self.dropouts, stacked.split(self.ranks), strict=True)
        h = [self._down(F.dropout(x, p), A) for p, A in parts]
        return torch.cat(h, dim=self._rank_dim(h[0]))

    def _input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    def _rank_dim(self, h: Tensor) -> int:
        return h.dim() - 1

    def _tokens_last(self, h: Tensor) -> Tensor:
        """The low-rank activation as (tokens, R)."""
        return h

    @abstractmethod
    def _stack_A(self, parts: Sequence[Tensor]) -> Tensor: ...

    @abstractmethod
    def _unstack_A(self, stacked: Tensor) -> Sequence[Tensor]: ...

    @abstractmethod
    def _down(self, x: Tensor, A: Tensor) -> Tensor: ...

    @abstractmethod
    def _up(self, y: Tensor, gated: Tensor, B: Tensor) -> Tensor: ...

    def _matrix(self, B: Tensor) -> Tensor:
        """One expert's B as (out, r)."""
        return B

    def _file_B(self, B: Tensor) -> Tensor:
        """One expert's B in the shape that its file has."""
        return B

    def unstack(self, tensors: Mapping[str, Tensor]) -> dict[int, LoraWeights]:
        """The experts' tensors as their files hold them, by expert number.

        Args:
            tensors: this layer's parameters by name, whole ones if they are sharded.
        """
        downs = self._unstack_A(tensors["lora_A"].detach())
        stacked = tensors["lora_B"].detach()
        ups = stacked[:, : sum(self.ranks)].split(self.ranks, dim=1)
        biases = dict(zip(self.biased, stacked[:, sum(self.ranks) :].unbind(1), strict=True))
        magnitudes = self._magnitudes(tensors)
        return {
            expert: LoraWeights(A, self._file_B(B), biases.get(i), magnitudes.get(i), self.is_embedding)
            for i, (expert, A, B) in enumerate(zip(self.members, downs, ups, strict=True))
        }

    def _magnitudes(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XLoraLayer:
        kept = keep_dtype(fn)
        pinned = [self.rank_scale, *(parameter.grad for parameter in self.parameters(recurse=False))]

        def own(tensor: Tensor) -> Tensor:
            precise = tensor.requires_grad or any(tensor is other for other in pinned)
            return kept(tensor) if precise else fn(tensor)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(own, recurse=False)

    def extra_repr(self) -> str:
        return f"number={self.number}, experts={self.members}, ranks={self.ranks}"


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook, of this module or of all modules, may hold on to the module's output."""
    own = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks  # pyright: ignore
    return bool(own) or bool(nn.modules.module._has_any_global_hook())  # pyright: ignore


def fit_tokens(columns: Tensor, tokens: torch.Size, layer: str) -> Tensor:
    """Columns (B, S, R) for tokens (B, S) or, flattened by the block, (B · S,); columns (R,) fit any tokens.

    Raises:
        RoutingError: the scalings are those of other tokens.
    """
    if columns.dim() == 1 or columns.shape[:-1] == tokens:
        return columns
    if len(tokens) == 1 and columns.shape[:-1].numel() == tokens[0]:
        return columns.flatten(0, -2)
    raise RoutingError(
        "A layer's input must hold the tokens that the scalings were made for, in their order.",
        received=f"scalings for tokens {tuple(columns.shape[:-1])} at a {layer} with input tokens {tuple(tokens)}",
        remedy="do not adapt layers that see other tokens than the backbone (position embeddings, poolers, "
        "sparsely dispatched expert blocks)",
    )


class XLoraLinear(XLoraLayer):
    """An adapted linear layer: `nn.Linear`, transformers' `Conv1D`, or a quantised one of the same interface.

    A DoRA expert with magnitude m and norm n = ‖W + c B A‖ adds (m/n - 1)(base(x) - bias) + (m/n) c B A x, gated by
    its scaling (SEMANTICS §2; DoRA, arXiv 2402.09353, section 4).
    """

    adapts = "linear layer"

    def __init__(self, base_layer: nn.Module, residents: Sequence[Resident], number: int, **options: Any) -> None:
        super().__init__(base_layer, residents, number, **options)
        dora = [i for i, r in enumerate(residents) if r.weights.magnitude is not None]
        self.dora = tuple(dora)
        if not dora:
            return
        m = torch.stack([m.flatten() for i in dora if (m := residents[i].weights.magnitude) is not None])
        self.lora_magnitude = nn.Parameter(m.to(self.lora_A), requires_grad=False)
        positions = [i for i, rank in enumerate(self.ranks) for _ in range(rank)] + list(self.biased)
        device = self.lora_A.device
        self._buffer("dora_positions", torch.tensor(dora, device=device))
        self._buffer("dora_experts", torch.tensor([residents[i].expert for i in dora], device=device))
        self._buffer("position_of_rank", torch.tensor(positions, device=device))
        self._dora_scales = tuple(residents[i].scale for i in dora)
        self._buffer("dora_norm", self._norms())
        self._norm_is_stale = False

    dora_positions: Tensor
    dora_experts: Tensor
    position_of_rank: Tensor
    dora_norm: Tensor

    def _stack_A(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def _unstack_A(self, stacked: Tensor) -> Sequence[Tensor]:
        return stacked.split(self.ranks)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def _up(self, y: Tensor, gated: Tensor, B: Tensor) -> Tensor:
        fresh = not torch.is_grad_enabled() or type(self.base_layer) is nn.Linear
        return add_up_projection(y, gated, B, in_place=fresh and not _is_watched(self.base_layer))

    def _add_experts(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        if not torch.is_grad_enabled() and self._is_plain():
            return self._add_plainly(y, x, routing)
        if not self.dora:
            return super()._add_experts(y, x, routing)
        ratio = self.dora_ratio()
        scalings = fit_tokens(routing.experts(self, self.dora_experts), y.shape[:-1], self.adapts)
        unbiased = y if self.bias is None else y - self.bias
        gain = (scalings.to(ratio.dtype) @ (ratio - 1)).to(y.dtype) * unbiased
        return y + gain + F.linear(self._gated(x, routing), self.lora_B * self.column_ratios(ratio)).to(y.dtype)

    def _is_plain(self) -> bool:
        """Whether the experts add `((x Aᵀ) ∘ columns) Bᵀ` and no more, to a `y` that nobody else holds."""
        dropping = self.training and any(self.dropouts)
        return not (self.dora or self.biased or dropping or _is_watched(cast(nn.Module, self._modules["base_layer"])))

    def _add_fused(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        columns = fit_tokens(routing.columns(self, x), x.shape[:-1], self.adapts)
        return add_mixture(y, x, self.lora_A, columns, self.lora_B)

    def _add_plainly(self, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
        """The same in as few steps as there can be, into `y` itself: a token's time is made of them."""
        parameters = cast("dict[str, Tensor]", self._parameters)
        down, up = parameters["lora_A"], parameters["lora_B"]
        if x.is_cuda and usable(y, x, down, up):
            return self._add_fused(y, x, routing)
        if x.dtype != down.dtype:
            return super()._add_experts(y, x, routing)
        weighed = routing.weighed(self)
        if weighed is not None:
            down, up = down.index_select(0, weighed.ranks), up.index_select(1, weighed.ranks)
        low_rank = F.linear(x, down)
        columns = routing.columns(self, low_rank) if weighed is None else weighed.columns
        if columns.shape != low_rank.shape:
            columns = fit_tokens(columns, low_rank.shape[:-1], self.adapts)
        return add_up_projection(y, low_rank.mul_(columns), up, in_place=True)

    def dora_ratio(self) -> Tensor:
        """(experts with DoRA, out): m / n; the norm is fixed at load and follows experts that are trained."""
        if self.lora_A.requires_grad:
            self._norm_is_stale = True
            return self.lora_magnitude / self._norms()
        if self._norm_is_stale:
            self.dora_norm, self._norm_is_stale = self._norms(), False
        return self.lora_magnitude / self.dora_norm

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._norm_is_stale = True

    def column_ratios(self, ratio: Tensor) -> Tensor:
        """(out, R): m / n of the expert of each rank column, 1 where it has none; `ratio` as `dora_ratio` gives it."""
        every = ratio.new_ones(len(self.ranks), ratio.shape[1]).index_copy(0, self.dora_positions, ratio)
        return every.index_select(0, self.position_of_rank).T

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """(experts with DoRA, out): ‖W + c B A‖ of each output row."""
        weight = dense_weight(self.base_layer)
        downs, ups = self.lora_A.split(self.ranks), self.lora_B[:, : sum(self.ranks)].split(self.ranks, dim=1)
        norms = [
            torch.linalg.vector_norm(weight + c * (ups[i].float() @ downs[i].float()), dim=1)
            for i, c in zip(self.dora, self._dora_scales, strict=True)
        ]
        return torch.stack(norms).to(self.lora_A.dtype)

    def _magnitudes(self, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
        if not self.dora:
            return {}
        return dict(zip(self.dora, tensors["lora_magnitude"].detach().unbind(0), strict=True))


class XLoraEmbedding(XLoraLayer):
    """An adapted embedding: the gate is applied after the lookup in A. An embedding scale (Gemma) is honoured."""

    adapts = "embedding"
    is_embedding = True

    def _stack_A(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).T

    def _unstack_A(self, stacked: Tensor) -> Sequence[Tensor]:
        return stacked.T.split(self.ranks)

    def _dropped_down(self, x: Tensor) -> Tensor:
        return self._down(x, self.lora_A)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A, cast(nn.Embedding, self.base_layer).padding_idx)

    def _up(self, y: Tensor, gated: Tensor, B: Tensor) -> Tensor:
        scale = getattr(self.base_layer, "embed_scale", None)
        gated = gated if scale is None else gated * torch.as_tensor(scale, device=gated.device, dtype=gated.dtype)
        return add_up_projection(y, gated, B, in_place=False)

    @property
    def embedding_dim(self) -> int:
        """The base layer's, for code of the base model that looks at it."""
        return cast(nn.Embedding, self.base_layer).embedding_dim

    @property
    def num_embeddings(self) -> int:
        """The base layer's, likewise."""
        return cast(nn.Embedding, self.base_layer).num_embeddings


class XLoraConv(XLoraLayer):
    """An adapted convolution: the low-rank activation (B, R, *positions) is gated, its positions being the tokens."""

    adapts = "convolution"

    def __init__(self, base_layer: _ConvNd, residents: Sequence[Resident], number: int, **options: Any) -> None:
        self._kernel_dims = len(base_layer.kernel_size)
        super().__init__(base_layer, residents, number, **options)

    def _stack_A(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def _unstack_A(self, stacked: Tensor) -> Sequence[Tensor]:
        return stacked.split(self.ranks)

    def _matrix(self, B: Tensor) -> Tensor:
        return B.flatten(1)

    def _file_B(self, B: Tensor) -> Tensor:
        return B.reshape(*B.shape, *[1] * self._kernel_dims)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        base = cast(Any, self.base_layer)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self._kernel_dims - 1]
        return convolve(x, A, None, base.stride, base.padding)

    def _rank_dim(self, h: Tensor) -> int:
        return h.dim() - 1 - self._kernel_dims

    def _tokens_last(self, h: Tensor) -> Tensor:
        return h.flatten(self._rank_dim(h) + 1).movedim(-2, -1)

    def _up(self, y: Tensor, gated: Tensor, B: Tensor) -> Tensor:
        return y + F.linear(gated, B).movedim(-1, -2).reshape(y.shape).to(y.dtype)


def layer_class(module: nn.Module) -> type[XLoraLayer] | None:
    """The adapted layer for a module of the base model; None where there is none."""
    kind = kind_of(module)
    return (
        None if kind is None else {"linear": XLoraLinear, "embedding": XLoraEmbedding, "convolution": XLoraConv}[kind]
    )
