"""What an adapted layer reads of a pass: how much each of its rank columns counts, for each token.

    column j of a layer, of expert e, is multiplied by  g · c_e · s[e]

B, S: batch, sequence. L: adapted layers. E: experts. R: total rank of an adapted layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loramix.experts.layer_use import TokenOrder

GATHERED_SHARE = 32  # gather, in float32, only if at most 1/32 of the rank columns count (docs/products.md)
GATHERED_TOKENS = 8  # more tokens seldom share the few experts that each of them uses
GATHERED_RANKS = 128  # fewer columns are multiplied as fast as they are gathered


@runtime_checkable
class Stack(Protocol):
    """What a routing needs to know of a layer's stacked experts."""

    number: int  # of the layer
    rank: int  # of its experts together, without the columns of LoRA biases
    index: Tensor  # (1,): the layer's number, as a tensor
    expert_of_rank: Tensor  # (R,): the expert of each rank column
    rank_scale: Tensor  # (R,): c_e of each rank column
    layout: int  # the number of its layout in the model; equal layouts have equal experts, ranks and c_e

    @property
    def lora_A(self) -> Tensor: ...


class GatheredColumns(NamedTuple):
    """The rank columns with a non-zero scaling, where they are so few that the others are left out.

    Attributes:
        ranks: (n,) their numbers.
        columns: (B, S, n) or (n,): g · c_e · s[e] of each.
    """

    ranks: Tensor
    columns: Tensor


@runtime_checkable
class Routing(Protocol):
    """What the adapted layers read in one pass."""

    @property
    def silent(self) -> bool:
        """Whether all scalings are 0: the model is its base model."""
        ...

    @property
    def reads_low_rank(self) -> bool:
        """Whether `columns` looks at the low-rank activation's values, not only at its dtype and device."""
        ...

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        """(B, S, R) or (R,): g · c_e · s[e] of each rank column, of the dtype and on the device of `low_rank`."""
        ...

    def experts(self, stack: Stack, chosen: Tensor, low_rank: Tensor) -> Tensor:
        """(B, S, n) or (n,): g · s[e] of the experts `chosen` (n,)."""
        ...

    def gathered(self, stack: Stack) -> GatheredColumns | None:
        """The columns that count, where multiplying these alone is cheaper; None where it is not."""
        ...

    def of_tokens(self, kept: int | Tensor) -> Routing:
        """The routing of the last `kept` tokens, of all if 0, or of those that a tensor numbers."""
        ...


class ConstantRouting:
    """Every expert has one scaling, in every layer and for every token. 0 means the base model."""

    reads_low_rank = False

    def __init__(self, value: float) -> None:
        self.value = float(value)

    @property
    def silent(self) -> bool:
        return self.value == 0.0

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        return (stack.rank_scale * self.value).to(low_rank.dtype)

    def experts(self, stack: Stack, chosen: Tensor, low_rank: Tensor) -> Tensor:
        return stack.rank_scale.new_full(chosen.shape, self.value)

    def gathered(self, stack: Stack) -> None:
        """None: all columns count."""

    def of_tokens(self, kept: int | Tensor) -> ConstantRouting:
        """Itself."""
        return self


class TensorRouting:
    """Scalings as a tensor: (B, S, L, E) for each token, or (L, E) for all tokens alike.

    Where all layers share their scalings, the columns of each layout are computed once, at the beginning of the pass
    and so outside the blocks, which gradient checkpointing runs again.

    Args:
        scalings: final scalings s. Their L may be 1 where all layers share them.
        weight: the global scaling weight g.
        layouts: one stack of each layout, by the number of the layout.
        orders: of the tokens in layers that hold them in another order, by number.
    """

    silent = False
    reads_low_rank = False

    def __init__(
        self,
        scalings: Tensor,
        weight: float = 1.0,
        layouts: Sequence[Stack] = (),
        orders: Mapping[int, TokenOrder] = MappingProxyType({}),
    ) -> None:
        self.scalings = scalings
        self._orders = orders
        self._weight = weight
        self._weighted = scalings if weight == 1.0 else scalings * float(weight)
        self._shared = scalings.shape[-2] == 1
        self._by_layer = self._weighted.unbind(-2)  # one stack in backward, not a zero-filled tensor for each layer
        self._columns = [self._expand(stack).to(stack.lora_A.dtype) for stack in layouts] if self._shared else []
        self._gathered: dict[int, GatheredColumns | None] = {}
        self._sparse = self._is_sparse()

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        if self._columns:
            made = self._columns[stack.layout]
            same = made.dtype == low_rank.dtype and made.device == low_rank.device
            return self._ordered(stack, made if same else made.to(low_rank), low_rank)
        return self._ordered(stack, self._expand(stack).to(low_rank), low_rank)

    def experts(self, stack: Stack, chosen: Tensor, low_rank: Tensor) -> Tensor:
        return self._ordered(stack, self._of(stack).index_select(-1, chosen), low_rank)

    def gathered(self, stack: Stack) -> GatheredColumns | None:
        if not self._sparse or stack.number in self._orders:
            return None
        key = stack.layout if self._shared and self._columns else stack.number
        if key not in self._gathered:
            self._gathered[key] = self._gather(stack)
        return self._gathered[key]

    def of_tokens(self, kept: int | Tensor) -> TensorRouting:
        if self.scalings.dim() == 2 or (isinstance(kept, int) and kept == 0):
            return self
        return TensorRouting(kept_tokens(self.scalings, kept), self._weight)

    def _ordered(self, stack: Stack, values: Tensor, low_rank: Tensor) -> Tensor:
        """Values for each token in the order in which the layer holds the tokens."""
        order = self._orders.get(stack.number)
        return values if order is None else order.fit(values, low_rank.shape[:-1])

    def _is_sparse(self) -> bool:
        """Whether most scalings are 0. Asked on a CPU only: elsewhere the answer would wait for the device."""
        scalings = self.scalings
        return (
            scalings.device.type == "cpu"
            and scalings.shape[-1] >= GATHERED_SHARE
            and scalings.shape[:-2].numel() <= GATHERED_TOKENS
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and GATHERED_SHARE * int(scalings.count_nonzero()) <= scalings.numel()
        )

    def _gather(self, stack: Stack) -> GatheredColumns | None:
        of_rank = stack.expert_of_rank
        if len(of_rank) < GATHERED_RANKS or stack.lora_A.dtype != torch.float32:
            return None
        weighted = self._of(stack)
        ranks = weighted.reshape(-1, weighted.shape[-1]).any(0)[of_rank].nonzero()[:, 0]
        if GATHERED_SHARE * len(ranks) > len(of_rank):
            return None
        columns = weighted.index_select(-1, of_rank[ranks]) * stack.rank_scale[ranks]
        return GatheredColumns(ranks, columns.to(stack.lora_A.dtype))

    def _expand(self, stack: Stack) -> Tensor:
        return self._of(stack).index_select(-1, stack.expert_of_rank) * stack.rank_scale

    def _of(self, stack: Stack) -> Tensor:
        return self._select(stack).to(stack.rank_scale.device)

    def _select(self, stack: Stack) -> Tensor:
        if self._shared:
            return self._by_layer[0]
        if torch.compiler.is_compiling():  # an int that differs in every block would compile every block anew
            return self._weighted.index_select(-2, stack.index).squeeze(-2)
        return self._by_layer[stack.number]


def kept_tokens(scalings: Float[Tensor, "B S #L E"], keep: int | Tensor) -> Tensor:
    """Those of the tokens that are kept for the head, as transformers keeps them: (B, n, L, E), of a mask (n, L, E)."""
    if isinstance(keep, int):
        return scalings[:, -keep:]
    if keep.dim() == 1:
        return scalings[:, keep]
    return scalings[keep] if keep.dtype == torch.bool else torch.take_along_dim(scalings, keep[..., None, None], 1)


class RoutingByTokens:
    """The routing of a pass whose layers do not all see the same tokens: each layer reads that of the tokens it sees.

    Args:
        make: the routing of some scalings.
        every: the routing of the tokens of the call.
        kept: (B, n, L, E), of those that the backbone keeps where it drops tokens on its way (`logits_to_keep`).
        cached: (B, T, L, E), of all tokens of the text, those of the call last.
        seeing_cached: the numbers of the layers that see the tokens in the cache: all of them, or the last ones where
            the cache holds a window; with a static cache, empty slots after them too.
    """

    silent = False
    reads_low_rank = False

    def __init__(
        self,
        make: Callable[[Tensor], TensorRouting],
        every: TensorRouting,
        kept: Tensor | None = None,
        cached: Tensor | None = None,
        seeing_cached: Collection[int] = (),
    ) -> None:
        self._make = make
        self.every = every
        self._kept = None if kept is None else make(kept)
        self._cached, self._seeing_cached = cached, seeing_cached
        self._last: dict[int, TensorRouting] = {}  # of as many of the last tokens

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        return self._seen_by(stack, low_rank).columns(stack, low_rank)

    def experts(self, stack: Stack, chosen: Tensor, low_rank: Tensor) -> Tensor:
        return self._seen_by(stack, low_rank).experts(stack, chosen, low_rank)

    def gathered(self, stack: Stack) -> None:
        """None: which tokens the layer sees is known too late."""

    def of_tokens(self, kept: int | Tensor) -> TensorRouting:
        return self.every.of_tokens(kept)

    def _seen_by(self, stack: Stack, low_rank: Tensor) -> TensorRouting:
        tokens = low_rank.shape[:-1]
        if self._cached is not None and stack.number in self._seeing_cached:
            return self._of_last(self._cached, tokens.numel() // len(self._cached))
        if self._kept is not None:
            kept = self._kept.scalings.shape[:-2]
            return self._kept if tokens in (kept, (kept.numel(),)) else self.every
        return self.every

    def _of_last(self, cached: Tensor, count: int) -> TensorRouting:
        if count not in self._last:
            empty = max(0, count - cached.shape[1])
            self._last[count] = self._make(F.pad(cached[:, -count:], (0, 0, 0, 0, 0, empty)))
        return self._last[count]


class RoutingByStream:
    """The routing of a decoder's pass, some of whose layers see the encoder's tokens.

    Args:
        own: of the decoder's tokens.
        encoder: of the encoder's.
        seeing_encoder: the numbers of the layers that see the encoder's.
    """

    silent = False
    reads_low_rank = False

    def __init__(self, own: Routing, encoder: Routing, seeing_encoder: Collection[int]) -> None:
        self._own, self._encoder, self._seeing_encoder = own, encoder, frozenset(seeing_encoder)

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        return self._seen_by(stack).columns(stack, low_rank)

    def experts(self, stack: Stack, chosen: Tensor, low_rank: Tensor) -> Tensor:
        return self._seen_by(stack).experts(stack, chosen, low_rank)

    def gathered(self, stack: Stack) -> GatheredColumns | None:
        return self._seen_by(stack).gathered(stack)

    def of_tokens(self, kept: int | Tensor) -> Routing:
        return self._own.of_tokens(kept)

    def _seen_by(self, stack: Stack) -> Routing:
        return self._encoder if stack.number in self._seeing_encoder else self._own


class LayerRouting:
    """Scalings that each layer makes of its own low-rank activation, in the one pass there is.

    Args:
        scalings: the final scalings (*tokens, E) of a layer, from its number and its low-rank activation
            (*tokens, R), without the columns of LoRA biases.
        weight: the global scaling weight g.
    """

    silent = False
    reads_low_rank = True

    def __init__(self, scalings: Callable[[int, Tensor], Tensor], weight: float = 1.0) -> None:
        self._make = scalings
        self._weight = float(weight)
        self._last: tuple[Tensor, Tensor] | None = None  # an activation, and what was made of it
        self._expansions: dict[int, Tensor] = {}  # by layout

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        weighted = self._weighted(stack, low_rank)
        if low_rank.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return (weighted.index_select(-1, stack.expert_of_rank) * stack.rank_scale).to(low_rank)
        expansion = self._expansions.get(stack.layout)
        if expansion is None:
            chosen = F.one_hot(stack.expert_of_rank, weighted.shape[-1])
            expansion = self._expansions[stack.layout] = chosen * stack.rank_scale.to(weighted).unsqueeze(-1)
        made = F.linear(weighted, expansion)  # one entry a row: exact, and on a CPU faster than choosing columns
        return made if made.dtype == low_rank.dtype else made.to(low_rank.dtype)

    def experts(self, stack: Stack, chosen: Tensor, low_rank: Tensor) -> Tensor:
        return self._weighted(stack, low_rank).index_select(-1, chosen)

    def gathered(self, stack: Stack) -> None:
        """None: which columns count is known too late."""

    def of_tokens(self, kept: int | Tensor) -> LayerRouting:
        """Itself: a layer makes the scalings of the tokens that it sees."""
        return self

    def _weighted(self, stack: Stack, low_rank: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not low_rank:
            read = low_rank if low_rank.shape[-1] == stack.rank else low_rank[..., : stack.rank]
            made = self._make(stack.number, read)
            self._last = low_rank, made if self._weight == 1.0 else made * self._weight
        return self._last[1]
