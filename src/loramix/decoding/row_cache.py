"""Keys and values of both passes in one store, by row and slot, for forwards that run both at once.

A row of the scaling pass and its row of the mixture pass may be at different tokens, and the slot of a rejected draft
is written again (that is the rollback). So each forward says where its rows write, and masks say what they may see.
Slots are counted as the passes' own caches count them, so that windows of attention are the same.

B: batch; rows 0 … B-1 are the scaling pass's, rows B … 2 B - 1 the mixture pass's. T: tokens of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from loramix._compat import UnboundedCacheLayer
from loramix.passes.cache import TwoPassCache

CHUNK = 64  # slots by which a store grows at least; one in eight where it is long


Rows = slice | Tensor
"""Rows of a store: a run of them, or their numbers."""
Write = tuple[Rows, int]
"""Rows that a forward writes, and the slot of their first token."""


def count_of(rows: Rows) -> int:
    """The number of rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


@dataclass
class Plan:
    """Which rows the next forward has, where they write how many tokens, and which slots they see.

    Attributes:
        rows: of the store, in the order of the forward's.
        writes: each run of them, and the slot of its first token.
        tokens: of each row.
        first: the first slot that is written.
        stop: the slot after the last one.
        length: tokens that both passes have read and that stay.
    """

    rows: Rows = field(default_factory=lambda: slice(0, 0))
    writes: tuple[Write, ...] = ()
    tokens: int = 0
    first: int = 0
    stop: int = 0
    length: int = 0

    def start(self, layer: RowLayer, slot: int | None = None) -> int:
        """The first slot that the token at `slot` may see; that any token of the forward may see, if that is None."""
        slot = self.first if slot is None else slot
        return layer.offset if layer.window is None else max(layer.offset, slot - layer.window + 1)


class RowLayer(UnboundedCacheLayer):
    """Keys and values of one block for all 2 B rows, grown in chunks and written in place.

    Args:
        base: the scaling pass's own layer.
        mixture: the mixture pass's.
        plan: the store's.
    """

    def __init__(self, base: DynamicLayer, mixture: DynamicLayer, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.window: int | None = getattr(mixture, "sliding_window", None)
        self.is_sliding = self.window is not None
        self.sources = base, mixture
        (keys, values), (mixture_keys, mixture_values) = _tensors(base), _tensors(mixture)
        kept = keys.shape[-2]
        self.offset = mixture.get_seq_length() - kept
        self.own_keys = self._grown(torch.cat([keys, mixture_keys]))
        self.own_values = self._grown(torch.cat([values, mixture_values]))
        self._share(kept)
        self.is_initialized = True

    @staticmethod
    def _grown(tensor: Tensor) -> Tensor:
        """Room for one more chunk, filled with zeros: the mask hides them, but would not hide a NaN."""
        slots = tensor.shape[2]
        more = max(CHUNK, slots // 8)
        grown = tensor.new_zeros(*tensor.shape[:2], slots + more, tensor.shape[3])
        grown[:, :, :slots] = tensor
        return grown

    def _halves(self) -> tuple[tuple[DynamicLayer, slice], ...]:
        """Each pass's own layer, and its rows here."""
        (base, mixture), batch = self.sources, len(self.own_keys) // 2
        return (base, slice(0, batch)), (mixture, slice(batch, 2 * batch))

    def _share(self, slots: int) -> None:
        """Let the passes' own caches hold views of this store, so that nothing is held twice."""
        for layer, rows in self._halves():
            layer.keys, layer.values = self.own_keys[rows, :, :slots], self.own_values[rows, :, :slots]

    def _grow(self) -> None:
        """Add a chunk, and drop the slots that have left the window of both passes."""
        first = self.plan.start(self, self.plan.length)
        old = slice(first - self.offset, None)
        self.own_keys, self.own_values = self._grown(self.own_keys[:, :, old]), self._grown(self.own_values[:, :, old])
        self.offset = first
        self._share(self.plan.length - first)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prompt has been read."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        plan = self.plan
        while plan.stop - self.offset > self.own_keys.shape[-2]:
            self._grow()
        given = 0
        for rows, slot in plan.writes:
            count, slots = count_of(rows), slice(slot - self.offset, slot - self.offset + plan.tokens)
            self.own_keys[rows, :, slots] = key_states[given : given + count]
            self.own_values[rows, :, slots] = value_states[given : given + count]
            given += count
        seen = slice(plan.start(self) - self.offset, plan.stop - self.offset)
        return self.own_keys[plan.rows, :, seen], self.own_values[plan.rows, :, seen]

    def get_seq_length(self) -> int:
        return self.plan.stop - self.plan.tokens

    def mask_sizes(self) -> tuple[int, int]:
        start = self.plan.start(self)
        return self.plan.stop - start, start

    def hand_back(self, length: int) -> None:
        """Give the passes' own caches what they would hold after sequential decoding."""
        for layer, rows in self._halves():
            kept = slice(0, length - self.offset)
            if isinstance(layer, DynamicSlidingWindowLayer):
                kept = slice(max(0, kept.stop - layer.sliding_window + 1), kept.stop)
                layer.cumulative_length = length
            layer.keys = self.own_keys[rows, :, kept].clone()
            layer.values = self.own_values[rows, :, kept].clone()


class RowCache(Cache):
    """Both passes' keys and values.

    Args:
        cache: both passes' own.
        batch: B.
        mask: (B, T), 0 at padding; None where there is none.
    """

    def __init__(self, cache: TwoPassCache, batch: int, mask: Tensor | None) -> None:
        self.plan = Plan()
        self.batch = batch
        self.mask = mask
        pairs = zip(_dynamic(cache.base), _dynamic(cache), strict=True)
        self.row_layers = [RowLayer(base, mixture, self.plan) for base, mixture in pairs]
        super().__init__(layers=[*self.row_layers])

    def write(self, length: int, tokens: int, *writes: Write) -> None:
        """Set what the next forward writes.

        Args:
            length: tokens that both passes have read and that stay.
            tokens: of each row.
            *writes: rows and the slot of their first token; several runs of rows are adjacent.
        """
        plan, slots = self.plan, [slot for _, slot in writes]
        plan.length = length
        first, last = writes[0][0], writes[-1][0]
        plan.writes = writes
        plan.rows = slice(first.start, last.stop) if isinstance(first, slice) and isinstance(last, slice) else first
        plan.tokens, plan.first, plan.stop = tokens, min(slots), max(slots) + tokens

    def masks(self, dtype: torch.dtype, device: torch.device) -> Any:
        """Additive masks of the next forward, as transformers' models take them; None if each row sees each slot.

        Returns:
            (rows, 1, tokens, slots), or a mapping of attention kind to that where the model has several.
        """
        plan = self.plan
        kinds = {"full_attention" if one.window is None else "sliding_attention": one for one in self.row_layers}
        if kinds.keys() == {"full_attention"} and self.mask is None and len(plan.writes) == plan.tokens == 1:
            return None
        firsts = torch.cat([torch.full((count_of(rows),), slot, device=device) for rows, slot in plan.writes])
        slots = firsts[:, None, None] + torch.arange(plan.tokens, device=device)[:, None]  # (rows, tokens, 1)
        found: dict[str, Tensor] = {}
        for kind, layer in kinds.items():
            hidden = self._hidden(layer, slots)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            found[kind] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
        return found if len(found) > 1 else next(iter(found.values()))

    def _hidden(self, layer: RowLayer, slots: Tensor) -> Tensor:
        """(rows, tokens, slots): what the token in each of `slots` (rows, tokens, 1) may not see."""
        start, stop = self.plan.start(layer), self.plan.stop
        places = torch.arange(start, stop, device=slots.device)
        hidden = places > slots
        if layer.window is not None:
            hidden = hidden | (places <= slots - layer.window)
        if self.mask is not None:
            texts = torch.arange(2 * self.batch, device=slots.device)[self.plan.rows] % self.batch
            padded = torch.nn.functional.pad(self.mask, (0, stop - self.mask.shape[1]), value=1)[:, start:stop] == 0
            hidden = hidden | padded[texts][:, None]
        return hidden

    def hand_back(self, length: int) -> None:
        """Make both halves of the cache that this store was made of hold the first `length` tokens."""
        for layer in self.row_layers:
            layer.hand_back(length)


def _dynamic(cache: Cache) -> list[DynamicLayer]:
    return cast("list[DynamicLayer]", cache.layers)  # `eligibility` has looked


def _tensors(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", (layer.keys, layer.values))
