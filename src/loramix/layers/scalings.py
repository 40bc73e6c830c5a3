"""How scalings reach the adapted layers: one thread-local slot that a pass fills and every layer reads.

A pass fills the slot for as long as it runs (`routed`). Under gradient checkpointing a block runs again in backward,
at another time and maybe in another thread; `checkpoint_with` re-fills the slot for that. Neither hooks nor arguments
of the blocks nor attributes of the layers take part, so two threads, two forwards before one backward, and blocks that
take no extra arguments all work (DESIGN, decision 3).

B, S: batch, sequence. L: adapted layers. E: experts. R: total rank of an adapted layer.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from loramix.errors import RoutingError


@runtime_checkable
class Stack(Protocol):
    """What a routing needs to know of a layer's stacked experts."""

    number: int
    index: Tensor  # (1,): the layer's number, as a tensor
    expert_of_rank: Tensor  # (R,): the expert of each rank column
    rank_scale: Tensor  # (R,): c_e of each rank column
    layout: int  # which of the model's layouts it has; equal ones mean equal experts, ranks and c_e

    @property
    def lora_A(self) -> Tensor: ...


FEW_TOKENS, FEW_LAYOUTS = 64, 4
GATHERED_TOKENS = 8  # of few tokens, the experts that any of them weighs are few too
GATHERED_RANKS = 128  # fewer are multiplied as fast as they are gathered


def gathered_share(dtype: torch.dtype) -> int:
    """Gathering pays where at most one in so many rank columns is weighed (docs/products.md)."""
    return 8 if dtype == torch.float32 else 32


class Weighed(NamedTuple):
    """The part of a layer's experts that a forward weighs at all.

    Attributes:
        ranks: (n,) the rank columns.
        columns: (B, S, n) or (n,): g · c_e · s[e] of each.
    """

    ranks: Tensor
    columns: Tensor


class ConstantRouting:
    """Every expert gets one value, in every layer and for every token. Zero means the base model."""

    def __init__(self, value: float) -> None:
        self.value = float(value)

    @property
    def silent(self) -> bool:
        return self.value == 0.0

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        """(R,): value · c_e for each rank column, of the dtype of the activation they weigh."""
        return (stack.rank_scale * self.value).to(low_rank.dtype)

    def weighed(self, stack: Stack) -> None:
        """All rank columns are weighed."""

    def experts(self, stack: Stack, chosen: Tensor) -> Tensor:
        """(n,): the scalings of the experts `chosen` (n,)."""
        return stack.rank_scale.new_full(chosen.shape, self.value)


class TensorRouting:
    """Scalings as a tensor: (B, S, L, E) for tokens of their own, (L, E) for all tokens alike.

    Args:
        scalings: final scalings s. Their L may be 1 where all layers share them.
        weight: the global scaling weight g.
        layouts: one layer of each layout, by the number of the layout. Where all layers share their scalings, the
            columns of each layout are computed here, once; not inside the blocks, which gradient checkpointing
            recomputes. Where each layer has its own, those of all layers are computed together, as if they had one
            layout, if the tokens are few, as in decoding, and so are the layouts.
    """

    silent = False

    def __init__(self, scalings: Tensor, weight: float = 1.0, layouts: Sequence[Stack] = ()) -> None:
        self.scalings = scalings
        self._weighted = scalings if weight == 1.0 else scalings * float(weight)
        self._shared = scalings.shape[-2] == 1
        self._by_layer = self._weighted.unbind(-2)  # one stack in backward, not a zero-filled tensor for each layer
        self._columns = [self._expand(stack).to(stack.lora_A.dtype) for stack in layouts] if self._shared else []
        few = scalings.shape[:-2].numel() <= FEW_TOKENS and 0 < len(layouts) <= FEW_LAYOUTS
        self._together = few and not self._shared and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self._of_layouts: dict[int, Sequence[Tensor]] = {}
        self._weighed: dict[int, Weighed | None] = {}
        self._sparse = self._is_sparse()

    def _is_sparse(self) -> bool:
        """Whether most experts are weighed with 0, on a CPU: elsewhere asking would wait for the device."""
        scalings = self.scalings
        return (
            scalings.device.type == "cpu"
            and scalings.shape[-1] >= gathered_share(torch.float32)
            and scalings.shape[:-2].numel() <= GATHERED_TOKENS
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and gathered_share(torch.float32) * int(scalings.count_nonzero()) <= scalings.numel()
        )

    def weighed(self, stack: Stack) -> Weighed | None:
        """The rank columns that any token weighs, where gathering them is cheaper than multiplying all."""
        if not self._sparse:
            return None
        key = stack.layout if self._shared and self._columns else stack.number
        if key not in self._weighed:
            self._weighed[key] = self._gather(stack)
        return self._weighed[key]

    def _gather(self, stack: Stack) -> Weighed | None:
        of_rank = stack.expert_of_rank
        if len(of_rank) < GATHERED_RANKS:
            return None
        weighted = self._of(stack)
        ranks = weighted.reshape(-1, weighted.shape[-1]).any(0)[of_rank].nonzero()[:, 0]
        if gathered_share(stack.lora_A.dtype) * len(ranks) > len(of_rank):
            return None
        columns = weighted.index_select(-1, of_rank[ranks]) * stack.rank_scale[ranks]
        return Weighed(ranks, columns.to(stack.lora_A.dtype))

    def columns(self, stack: Stack, low_rank: Tensor) -> Tensor:
        """(B, S, R) or (R,): g · c_e · s[e] for each rank column, where and of what dtype the activation is."""
        if self._columns:
            made = self._columns[stack.layout]
            return made if made.dtype == low_rank.dtype and made.device == low_rank.device else made.to(low_rank)
        return (self._of_all(stack)[stack.number] if self._together else self._expand(stack)).to(low_rank)

    def _of_all(self, stack: Stack) -> Sequence[Tensor]:
        """The columns of all layers, as if all had this one's layout."""
        found = self._of_layouts.get(stack.layout)
        if found is None:
            weighted = self._weighted.to(stack.rank_scale.device)
            expanded = weighted.index_select(-1, stack.expert_of_rank) * stack.rank_scale
            found = self._of_layouts[stack.layout] = expanded.to(stack.lora_A.dtype).unbind(-2)
        return found

    def experts(self, stack: Stack, chosen: Tensor) -> Tensor:
        """(B, S, n) or (n,): g · s[e] of the experts `chosen` (n,)."""
        return self._of(stack).index_select(-1, chosen)

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


class Watched:
    """A routing for one pass whose last hidden states somebody wants to see.

    Args:
        routing: what the layers read.
        rows: of the batch, those that go on to the head; all of them if None.

    Attributes:
        hidden: the backbone's last hidden states (B, S, H) of all rows, once the pass has run.
    """

    def __init__(self, routing: ConstantRouting | TensorRouting, rows: slice | None = None) -> None:
        self.routing = routing
        self.rows = rows
        self.hidden: Tensor | None = None


Routing = ConstantRouting | TensorRouting


class _Slot(threading.local):
    def __init__(self) -> None:  # set here, not on the class: compiled code guards on the instance's own dictionary
        self.routing: Routing | None = None
        self.overrides: tuple[tuple[object, Callable[[], Routing | Watched]], ...] = ()


_slot = _Slot()


def current() -> Routing:
    """The routing in force.

    Raises:
        RoutingError: no pass is under way in this thread.
    """
    routing = _slot.routing
    if routing is None:
        raise RoutingError(
            "An adapted layer runs only inside the passes of its model.",
            received="a call of the layer, or of a block around it, on its own",
            remedy="call the model or its backbone; they run both passes and hand the scalings to the layers",
        )
    return routing


def routed(routing: Routing, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call with `routing` in force for this thread, and restore what was in force before."""
    outer, _slot.routing = _slot.routing, routing
    try:
        return call(*args, **kwargs)
    finally:
        _slot.routing = outer


@contextmanager
def override(owner: object, routing: Callable[[], Routing | Watched]) -> Generator[None]:
    """Inside, in this thread, the model that owns `owner` makes one pass with `routing()` instead of two passes.

    Nests: the innermost is in force. Like `torch.no_grad`, it does not reach into other threads.
    """
    outer = _slot.overrides
    _slot.overrides = (*outer, (owner, routing))
    try:
        yield
    finally:
        _slot.overrides = outer


def overriding(owner: object) -> Callable[[], Routing | Watched] | None:
    """The innermost override of `owner` in this thread."""
    for other, routing in reversed(_slot.overrides):
        if other is owner:
            return routing
    return None


def checkpoint_with(inner: Callable[..., Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `call` through `inner` so that its recomputation sees the routing that is in force now."""
    return inner(functools.partial(_replay, call, _slot.routing), *args, **kwargs)


def _replay(call: Callable[..., Any], routing: Routing | None, *args: Any, **kwargs: Any) -> Any:
    if routing is None or _slot.routing is routing:
        return call(*args, **kwargs)
    return routed(routing, call, *args, **kwargs)
