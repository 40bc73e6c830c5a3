"""Recording a mixture's routing from outside: the tokens that each forward reads, and the texts that they continue.

A forward reads tokens of several texts, one in each row. A row continues the text that its cache holds: the record
follows the cache through everything that happens to its rows: reordering, repetition, cropping and copying. A text
that is continued in two ways forks: the second way is a text of its own that begins where the two part.

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
from typing import Any

import torch

from loramix.analysis.record.cache_rows import CacheRows, RereadTexts, TextPosition
from loramix.analysis.record.files import finish_spill, new_folder
from loramix.analysis.record.header import Header
from loramix.analysis.record.numbering import TextNumbering
from loramix.analysis.record.part import Part
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.record.slots import held_before, packed_starts, real_slots
from loramix.analysis.record.stores import MemorySource, Reservoir, Source, SpillStore, Store
from loramix.config.checks import require_integer
from loramix.decoding.requests import Request, request
from loramix.experts.base_model import text_config
from loramix.passes.cache import FollowedCache
from loramix.passes.call import cache_in
from loramix.passes.hooks import CacheFollower, RouterOutput, RoutingHook, between_graphs
from loramix.passes.state import MixtureState, attach, require_routing, state_of

MAX_TOKENS = 10_000
Reader = tuple[int, bool, bool]
"""A thread, whether its logits processors are running, and whether an encoder reads. Only forwards of the same reader
continue each other."""


def _reader(*, of_encoder: bool = False) -> Reader:
    return threading.get_ident(), request().scoring, of_encoder


@dataclass
class _LastForward:
    """The tokens of a reader's last forward: until its next one, `generate` may still take them back."""

    rows: CacheRows
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

    A token is recorded once for each text, by the forward that reads it. Padding is not recorded, nor are finished rows
    that `generate` pads, candidates that it read and then rejected (prompt lookup, an assistant), and candidates that
    the model drafts for itself. What a logits processor reads is a text of its own. In a beam search each beam is a
    text of its own that forks where beams part; rejected beams stay in the record. Tokens that a cache held before the
    recording are not recorded, but positions count them.

    A model that was compiled with `fullgraph=True` cannot be recorded: the recording runs between graphs.

    What an encoder reads are texts of their own (`record.header.encoder_texts`). Each token has scalings for all
    layers, also for those that see the other part's tokens and do not apply them.

    Without a cache, a forward is not known to continue an earlier one's text, except inside `generate`. Each process
    records what it reads itself, as in an evaluation on several devices.

    Args:
        model: the mixture, not a wrapper around it.
        tokenizer: its tokenizer, for the text of the tokens.
        max_tokens: the most tokens whose scalings are kept in memory. Beyond that the record is a uniform sample of the
            tokens that were read; with `spill`, so many are kept before they are written out.
        spill: a new or empty folder to keep all tokens in; `RoutingRecord.load` reads it later.
        only_this_thread: do not record what other threads read meanwhile.
        seed: of the sample.

    Yields:
        The record; it can be read inside and afterwards.

    Raises:
        UnsupportedOperationError: a model without a router.
        RoutingError: a mixture that makes no scalings: its routing is fixed, or its adapters are disabled; or
            `tokenizer` is not a tokenizer.
        ConfigurationError: an invalid `max_tokens` or `seed`, or a spill folder that is not empty.
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
        hook.store = Reservoir(max_tokens, seed) if spill is None else SpillStore(new_folder(spill), max_tokens)
        yield hook.record
    finally:
        detach()
        hook.close()
    if hook.record.is_sample:
        warnings.warn(f"{hook.record.note} Pass max_tokens= or spill= to keep more.", stacklevel=3)


class Recorder(RoutingHook):
    """The hook that fills a record, and the record's source until it is closed.

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        store: where the tokens go.
        thread: the only thread to record; None records all.
    """

    def __init__(self, model: Any, tokenizer: Any, store: Store | None, thread: int | None) -> None:
        self.state: MixtureState | None = state_of(model)
        self.store = store
        self._closed: Source | None = None
        self._model: Any = model
        self._thread = thread
        self._lock = threading.RLock()
        self._last: dict[Reader, _LastForward] = {}
        self._reread_texts: dict[Reader, RereadTexts] = {}
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.header = Header.of(self.state)
        self._texts = TextNumbering(self.header)
        self.record = RoutingRecord(self.header, self, tokenizer)

    @property
    def kept(self) -> int:
        """The number of tokens so far, without those that a running `generate` may still take back."""
        with self._lock:
            self._settle()
            return self._source.kept

    @property
    def id(self) -> str | None:
        """The id in the record's files, once all tokens have been spilled into them."""
        return None if self._closed is None else self._closed.id

    def parts(self) -> Iterator[Part]:
        """The tokens as they are now."""
        with self._lock:
            self._settle()
            return self._source.parts()

    @property
    def _source(self) -> Source:
        return self._closed or self.store or MemorySource([])

    def _settle(self) -> None:
        for reader, last in self._last.items():
            if not last.call.running:
                self._keep(reader)

    def commit(self) -> None:
        """Store the tokens that could still have been taken back."""
        with self._lock:
            for reader in self._last:
                self._keep(reader)

    def _keep(self, reader: Reader) -> None:
        last = self._last.get(reader)
        part = None if last is None else last.part
        if last is not None and part is not None:
            last.part = None
            if self.store is not None and len(part):
                self.store.add(part)
                self.header.seen += len(part)

    def close(self) -> None:
        """Stop recording, and stop following caches."""
        with self._lock:
            try:
                self.commit()
                if isinstance(self.store, SpillStore):
                    self._closed = finish_spill(self.store, self.record)
                else:
                    self._closed = self.store
            finally:
                self.store = self.state = self._model = None  # a record outlives its model
                self._last.clear()
                self._reread_texts.clear()
                for cache in self._caches:
                    if isinstance(cache, FollowedCache):  # it may have become a plain cache meanwhile
                        cache.followers = tuple(other for other in cache.followers if not self._owns(other))

    def _owns(self, follower: CacheFollower) -> bool:
        return isinstance(follower, CacheRows) and follower.observer is self

    def routed(self, output: RouterOutput) -> None:
        reader = _reader(of_encoder=output.of_encoder)
        if self._thread not in (None, reader[0]):
            return
        with self._lock:
            state = self._recorded()
            if state is None:
                return
            self._keep(reader)
            self.header.note_settings(state)
            self._last[reader] = _LastForward(*self._read(output, reader), request())

    def _recorded(self) -> MixtureState | None:
        """The mixture's state; None while a forward drafts candidates, or a hook asks not to be recorded."""
        state = None if self.store is None or request().drafts else self.state
        return None if state is None or any(hook.unrecorded for hook in state.hooks) else state

    def cached(self, cache: FollowedCache) -> None:
        with self._lock:
            last = self._last.get(_reader())
            if last is not None and self._recorded() is not None:
                self._follow(cache, last.rows)

    def _follow(self, cache: FollowedCache, rows: CacheRows) -> None:
        cache.followers = (*(other for other in cache.followers if not self._owns(other)), rows)
        self._caches.add(cache)

    def _read(self, output: RouterOutput, reader: Reader) -> tuple[CacheRows, Part]:
        """The rows of a forward, moved on, and the tokens that it read for the first time."""
        inputs, final = output.inputs, output.final.detach()
        cache = cache_in(inputs)
        batch, length = final.shape[:2]
        ids = inputs.get("input_ids")
        tokens = torch.full((batch, length), -1) if ids is None else ids.detach().cpu().long()
        call = request()
        rows = self._rows_of(cache, batch, length, inputs)
        before = rows.real.shape[1]
        real = real_slots(inputs.get("attention_mask"), batch, length, before)
        known = self._reread(call, reader) if cache is None and call.running and ids is not None else None
        new = real if known is None else known.find_new(tokens, real, rows)
        if call.running and call.finished is not None and len(call.finished) == batch:
            new = new & ~call.finished.cpu()[:, None]  # finished rows, which are only padded
            real = real if known is not None else new
        starts = packed_starts(inputs, batch, length) if cache is None and self._makes_no_cache(inputs) else None
        sequence, position = self._texts.number(rows, new, starts)
        if known is not None:
            known.remember(tokens, real, rows)
        if output.of_encoder:
            self.header.encoder_texts += sequence[new].unique().tolist()
        chosen = final[new.to(final.device)].float().cpu()
        rows.real = torch.cat([rows.real, real], dim=1)
        return rows, Part(sequence[new], position[new], tokens[new], chosen)

    def _reread(self, call: Request, reader: Reader) -> RereadTexts:
        """The texts that a `generate` without a cache reads again."""
        known = self._reread_texts.get(reader)
        if known is None or known.call is not call:
            known = self._reread_texts[reader] = RereadTexts(call)
        return known

    def _makes_no_cache(self, inputs: Any) -> bool:
        """Whether the forward makes no cache either: only then do positions tell packed texts apart."""
        use = inputs.get("use_cache")
        return not (getattr(text_config(self._model.config), "use_cache", False) if use is None else use)

    def _rows_of(self, cache: Any, batch: int, length: int, inputs: Any) -> CacheRows:
        """Where the rows of a forward stand before it."""
        if not isinstance(cache, FollowedCache):
            return CacheRows(self, batch)
        self._caches.add(cache)
        own = next((other for other in cache.followers if self._owns(other)), None)
        if isinstance(own, CacheRows) and own.batch == batch:
            return own
        rows = CacheRows(self, batch)
        held = 0 if own is not None else held_before(cache, inputs, length)
        if held:  # filled before the recording began
            rows.real = real_slots(inputs.get("attention_mask"), batch, held, 0)
            rows.places = [self._texts.start(count) for count in rows.real.sum(1).tolist()]
        self._follow(cache, rows)
        return rows

    def take_back(self, rows: CacheRows, tokens: int) -> None:
        """Slots at the end of the rows were removed; tokens of the last forward among them are not recorded."""
        with self._lock:
            gone = rows.real[:, -tokens:].sum(1).tolist()
            rows.real = rows.real[:, :-tokens]
            mine = request().running  # it crops rejected candidates; what others crop was read all the same
            last = next((one for one in self._last.values() if mine and one.rows is rows), None)
            for row, place in enumerate(rows.places):
                if place is None or not gone[row]:
                    continue
                length = place.length - gone[row]
                rows.places[row] = TextPosition(place.sequence, length)
                if last is not None and last.part is not None:
                    part = last.part
                    stays = (part.sequence != place.sequence) | (part.position < length)
                    last.part = part[stays]
                    self._texts.shorten(place.sequence, int((~stays).sum()))
