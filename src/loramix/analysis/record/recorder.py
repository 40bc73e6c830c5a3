"""Recording a mixture's routing from outside: which tokens each forward reads, and which texts they go on with.

A forward reads tokens of several texts, its rows. A row goes on with the text that its cache holds: the record follows
the cache through everything that happens to its rows, reordering, repetition, cropping and copying. A text that goes
on in two ways forks: the second way is a text of its own that begins where the first one left it.

B, S: rows and tokens of a forward. T: slots that a cache held before it, padding among them. L: adapted layers, 1 where
they share their scalings. E: experts.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from loramix.analysis.record.files import finish_folder, new_folder
from loramix.analysis.record.followed import Followed, Place, Uncached
from loramix.analysis.record.header import Header
from loramix.analysis.record.parts import Kept, Part, Reservoir, Shards, Source, Store
from loramix.analysis.record.reading import held_before, packed_starts, real_slots
from loramix.analysis.record.record import RoutingRecord
from loramix.config.checks import require_integer
from loramix.config.xlora import XLoraConfig
from loramix.decoding.requests import Request, request
from loramix.passes.cache import TwoPassCache
from loramix.passes.hooks import CacheFollower, Made, RoutingHook, between_graphs
from loramix.passes.two_pass import MixtureState, attach, cache_in, require_routing

MAX_TOKENS = 10_000
Reader = tuple[int, bool]
"""Whose forwards go on with each other: a thread's, and apart from them those of its logits processors."""


def _reader() -> Reader:
    return threading.get_ident(), request().scoring


@dataclass
class _Waiting:
    """The tokens of a reader's last forward: until its next one, `generate` may still take them back."""

    rows: Followed
    part: Part | None
    call: Request


@contextmanager
def record_routing(
    model: Any,
    tokenizer: Any = None,
    *,
    max_tokens: int = MAX_TOKENS,
    spill: str | PathLike[str] | None = None,
    only_this_thread: bool = False,
    seed: int = 0,
) -> Generator[RoutingRecord]:
    """Record the final scalings of every token that a mixture reads inside: in forwards, `generate`, an evaluation.

    A token is recorded once for each text, in whichever forward the text's cache took it in. Padding is left out, what
    `generate` pads finished rows with too, and so are candidates that `generate` read and then cropped (prompt lookup,
    an assistant) or that the model drafts for itself. What a logits processor reads is a text of its own. In a beam
    search each beam is a text of its own that forks where beams part; beams that were given up stay. Tokens that a
    cache held before are not recorded; positions count them.

    A model that was compiled with `fullgraph=True` cannot be recorded: the recording runs between graphs.

    Without a cache nothing tells that a forward goes on with an earlier one's text, except inside `generate`. Each
    process records what itself reads, as in an evaluation on several devices.

    Args:
        model: the mixture, not a wrapper around it.
        tokenizer: its tokenizer, for the text of the tokens.
        max_tokens: of how many tokens scalings are kept in memory: beyond that a sample, in which each token that was
            read stands with the same chance; with `spill`, how many are kept before they are written out.
        spill: a new or empty folder to keep all tokens in; `RoutingRecord.load` reads it later.
        only_this_thread: leave out what other threads read meanwhile.
        seed: of the sample.

    Yields:
        The record; it can be read inside, and afterwards.

    Raises:
        UnsupportedOperationError: a model without a router.
        RoutingError: a mixture that makes no scalings: its routing is fixed, or its adapters are disabled; or what is
            no tokenizer.
        ConfigurationError: `max_tokens` or `seed` that are no such number, or a spill folder that holds something.
        SaveError: a spill folder that cannot be written.
    """
    remedy = f"Pass for example max_tokens={MAX_TOKENS}, or spill= a folder for all tokens."
    require_integer("max_tokens", max_tokens, at_least=1, remedy=remedy)
    require_integer("seed", seed, at_least=0, remedy="Pass a number such as 0.")
    hook = Recorder(model, tokenizer, None, threading.get_ident() if only_this_thread else None)
    between_graphs(hook)
    detach = attach(model, hook)
    try:
        require_routing(model)
        hook.store = Reservoir(max_tokens, seed) if spill is None else Shards(new_folder(spill), max_tokens)
        yield hook.record
    finally:
        detach()
        hook.close()
    if hook.record.is_sample:
        warnings.warn(f"{hook.record.note} Pass max_tokens= or spill= to keep more.", stacklevel=3)


class Recorder(RoutingHook):
    """The hook that fills a record, and what is behind the record until it is closed.

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        store: where tokens are kept.
        thread: the only one that is recorded; None records all.
    """

    def __init__(self, model: Any, tokenizer: Any, store: Store | None, thread: int | None) -> None:
        self.state = state = cast("MixtureState | None", getattr(model, "_loramix", None))
        self.store = store
        self._closed: Source | None = None
        self._model: Any = model
        self._thread = thread
        self._lock = threading.RLock()
        self._lengths: list[int] = []  # of each text
        self._waiting: dict[Reader, _Waiting] = {}
        self._uncached: dict[Reader, Uncached] = {}
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.header = Header() if state is None else Header.of(state)
        self.record = RoutingRecord(self.header, self, tokenizer)

    @property
    def kept(self) -> int:
        """How many tokens are kept so far: without those that a `generate` under way may still take back."""
        with self._lock:
            self._settle()
            return self._source.kept

    @property
    def id(self) -> str | None:
        """Of the files, once the record is spilled into them to its end."""
        return None if self._closed is None else self._closed.id

    def parts(self) -> Iterator[Part]:
        """They, as they are now."""
        with self._lock:
            self._settle()
            return self._source.parts()

    @property
    def _source(self) -> Source:
        return self._closed or self.store or Kept([])

    def _settle(self) -> None:
        for reader, waiting in self._waiting.items():
            if not waiting.call.running:
                self._keep(reader)

    def commit(self) -> None:
        """Keep what could still have been taken back."""
        with self._lock:
            for reader in self._waiting:
                self._keep(reader)

    def _keep(self, reader: Reader) -> None:
        waiting = self._waiting.get(reader)
        part = None if waiting is None else waiting.part
        if waiting is not None and part is not None:
            waiting.part = None
            if self.store is not None and len(part):
                self.store.add(part)
                self.header.seen += len(part)

    def close(self) -> None:
        """Nothing more is recorded; caches are followed no longer."""
        with self._lock:
            try:
                self.commit()
                if isinstance(self.store, Shards):
                    self._closed = finish_folder(self.store, self.record)
                else:
                    self._closed = self.store
            finally:
                self.store = self.state = self._model = None  # a record outlives its model
                self._waiting.clear()
                self._uncached.clear()
                for cache in self._caches:
                    if isinstance(cache, TwoPassCache):  # one that was separated is a plain one by now
                        cache.followers = tuple(other for other in cache.followers if not self._owns(other))

    def _owns(self, follower: CacheFollower) -> bool:
        return isinstance(follower, Followed) and follower.recorder is self

    def made(self, made: Made) -> None:
        reader = _reader()
        if self._thread not in (None, reader[0]):
            return
        with self._lock:
            state = self._recorded()
            if state is None:
                return
            self._keep(reader)
            self.header.note(cast(XLoraConfig, state.config))
            self._waiting[reader] = _Waiting(*self._read(made, reader), request())

    def _recorded(self) -> MixtureState | None:
        """The mixture's state; None where forwards of now are of an experiment, or write candidates for itself."""
        state = None if self.store is None or request().drafts else self.state
        return None if state is None or any(hook.unrecorded for hook in state.hooks) else state

    def cached(self, cache: TwoPassCache) -> None:
        with self._lock:
            waiting = self._waiting.get(_reader())
            if waiting is not None and self._recorded() is not None:
                self._follow(cache, waiting.rows)

    def _follow(self, cache: TwoPassCache, rows: Followed) -> None:
        cache.followers = (*(other for other in cache.followers if not self._owns(other)), rows)
        self._caches.add(cache)

    def _read(self, made: Made, reader: Reader) -> tuple[Followed, Part]:
        """What a forward read, and how far its rows have come."""
        inputs, final = made.inputs, made.final.detach()
        cache = cache_in(inputs)
        batch, length = final.shape[:2]
        ids = inputs.get("input_ids")
        tokens = torch.full((batch, length), -1) if ids is None else ids.detach().cpu().long()
        call = request()
        rows = self._rows_of(cache, batch, length, inputs)
        before = rows.real.shape[1]
        real = real_slots(inputs.get("attention_mask"), batch, length, before)
        known = self._reread(call, reader) if cache is None and call.running and ids is not None else None
        new = real if known is None else known.meet(tokens, real, rows)
        if call.running and call.finished is not None and len(call.finished) == batch:
            new = new & ~call.finished.cpu()[:, None]  # these rows are only padded
            real = real if known is not None else new
        starts = packed_starts(inputs, batch, length) if cache is None and self._makes_no_cache(inputs) else None
        sequence, position = self._number(rows, new, starts)
        if known is not None:
            known.keep(tokens, real, rows)
        chosen = final[new.to(final.device)].float().cpu()
        rows.real = torch.cat([rows.real, real], dim=1)
        return rows, Part(sequence[new], position[new], tokens[new], chosen)

    def _reread(self, call: Request, reader: Reader) -> Uncached:
        """The texts that a `generate` without a cache reads again."""
        known = self._uncached.get(reader)
        if known is None or known.call is not call:
            known = self._uncached[reader] = Uncached(call)
        return known

    def _makes_no_cache(self, inputs: Any) -> bool:
        """Whether the forward makes no cache either: only then are packed texts told apart, by positions."""
        use = inputs.get("use_cache")
        return not (getattr(self._model.config.get_text_config(), "use_cache", False) if use is None else use)

    def _rows_of(self, cache: Any, batch: int, length: int, inputs: Any) -> Followed:
        """How far the rows of a forward have come before it."""
        if not isinstance(cache, TwoPassCache):
            return Followed(self, batch)
        self._caches.add(cache)
        own = next((other for other in cache.followers if self._owns(other)), None)
        if isinstance(own, Followed) and own.batch == batch:
            return own
        rows = Followed(self, batch)
        held = 0 if own is not None else held_before(cache, inputs, length)
        if held:  # filled before the record was there
            rows.real = real_slots(inputs.get("attention_mask"), batch, held, 0)
            rows.places = [self._new(count) for count in rows.real.sum(1).tolist()]
        self._follow(cache, rows)
        return rows

    def _new(self, length: int = 0, parent: Place | None = None) -> Place:
        number = len(self._lengths)
        self._lengths.append(length)
        if parent is not None:
            self.header.forks[number] = parent.sequence, parent.length
        return Place(number, length)

    def _number(self, rows: Followed, new: Bool[Tensor, "B S"], starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, S) each: the text of each token, and its position there."""
        if starts is None and bool(new.all()):
            return self._number_whole(rows, new)
        sequence, position = torch.zeros(new.shape, dtype=torch.long), torch.zeros(new.shape, dtype=torch.long)
        for row in range(len(new)):
            edges = [0] if starts is None else torch.nonzero(starts[row]).flatten().tolist()
            for first, last in zip(edges, [*edges[1:], new.shape[1]], strict=True):
                if first:
                    rows.places[row] = self._new()
                place, count = self._advance(rows, row, new[row, first:last])
                sequence[row, first:last] = place.sequence
                position[row, first:last] = place.length + count - 1
        return sequence, position

    def _number_whole(self, rows: Followed, new: Tensor) -> tuple[Tensor, Tensor]:
        places = [self._advance(rows, row, None, new.shape[1])[0] for row in range(len(new))]
        sequence = torch.tensor([place.sequence for place in places])[:, None].expand(new.shape)
        first = torch.tensor([place.length for place in places])[:, None]
        return sequence, first + torch.arange(new.shape[1])

    def _advance(self, rows: Followed, row: int, new: Tensor | None, many: int = 0) -> tuple[Place, Tensor]:
        """Where a row's new tokens begin, and which of them each is, from 1; the row stands behind them now."""
        place = rows.places[row] or self._new()
        count = torch.arange(1, many + 1) if new is None else new.long().cumsum(0)
        added = many if new is None else int(new.sum())
        if added and self._lengths[place.sequence] != place.length:
            place = self._new(place.length, place)
        if added:
            self._lengths[place.sequence] += added
        rows.places[row] = Place(place.sequence, place.length + added)
        return place, count

    def take_back(self, rows: Followed, tokens: int) -> None:
        """Slots at the end of rows are gone: what was read last, and is gone, is not recorded at all."""
        with self._lock:
            gone = rows.real[:, -tokens:].sum(1).tolist()
            rows.real = rows.real[:, :-tokens]
            mine = request().running  # only `generate` crops what it has read in vain; who else does has read it
            waiting = next((wait for wait in self._waiting.values() if mine and wait.rows is rows), None)
            for row, place in enumerate(rows.places):
                if place is None or not gone[row]:
                    continue
                length = place.length - gone[row]
                rows.places[row] = Place(place.sequence, length)
                if waiting is not None and waiting.part is not None:
                    part = waiting.part
                    stays = (part.sequence != place.sequence) | (part.position < length)
                    waiting.part = part[stays]
                    self._lengths[place.sequence] -= int((~stays).sum())
