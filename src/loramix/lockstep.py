"""One forward per token: the scaling pass runs one token ahead, in the same forward as the mixture pass.

The scaling pass is a run of the base model, and scalings belong to rows and tokens. So a batch of 2 B rows holds both
passes: in rows 0 … B-1 the scaling pass reads its own greedy draft of the next token, in rows B … 2 B - 1 the mixture
pass reads the current one, with the scalings that the scaling pass made for it one step before. A draft that is the
token which was chosen then leaves nothing to do; another one costs a forward of the scaling pass alone. A token costs
1 + (share of wrong drafts) forwards, against 2, and no token differs from two passes one after the other: a draft
decides about work, never about text.

Both passes write into one store of keys and values by row and slot. A wrong draft's slot is written again, so nothing
is cropped, and windows of attention, counted in slots, stay what they are.

Whether that pays depends on the machine (how much more two rows cost than one), the vocabulary (a draft needs the
head), and the text (how often drafts are right). It is measured while it runs, and the cheaper way is taken.

B, T: batch, tokens so far. E: experts. L: adapted layers.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from loramix.cache import TwoPassCache
from loramix.draft_head import DraftHead
from loramix.eligible import why_not_this_token
from loramix.pace import Pace
from loramix.passes import MixtureState
from loramix.row_cache import RowCache
from loramix.scalings import Routing, TensorRouting, Watched, override


@dataclass
class LockstepReport:
    """What one generation did after its prompt.

    Attributes:
        tokens: read after the prompt, by each row.
        forwards: of the backbone, for either pass or for both at once.
        drafts: that were compared with the token which was chosen.
        right: of them, those that were it, in every row.
        reason: why the two passes went one after the other all along, where they did.
    """

    tokens: int = 0
    forwards: int = 0
    drafts: int = 0
    right: int = 0
    reason: str | None = None

    @property
    def forwards_per_token(self) -> float:
        """2 without lockstep; 1 + the share of wrong drafts with it."""
        return self.forwards / self.tokens if self.tokens else float("nan")

    @property
    def accepted(self) -> float:
        """The share of right drafts."""
        return self.right / self.drafts if self.drafts else float("nan")


class _Ahead(NamedTuple):
    """What the scaling pass knows one token ahead: the hidden states of its draft, and the draft after it."""

    settings: tuple[float, float]  # what it has read it with: the scaling pass's value, and g
    token: Tensor  # (B,): what it has read
    hidden: Tensor  # (B, 1, H)
    next: Tensor  # (B,): its guess of what follows


class Lockstep:
    """One generation's decoding, token by token.

    Args:
        model: the mixture.
        state: its state.
        wanted: True: as far as it is exact; None: also only while it pays; False: not at all, but the routing may be
            fixed after some tokens.
        cache: the one that this generation fills; calls with another one are left to the model.
        ends: token ids after which a row is finished, and what its passes read does not matter any more; None where
            somebody could see it.
    """

    def __init__(self, model: Any, state: MixtureState, wanted: bool | None, cache: Any, ends: Tensor | None) -> None:
        self.model, self.state, self.wanted, self.cache, self.ends = model, state, wanted, cache, ends
        self.report = LockstepReport()
        self._store: RowCache | None = None
        self._length = 0
        self._ahead: _Ahead | None = None
        self._sum: Tensor | None = None  # of the scalings, while they are to be fixed
        self._kept: TensorRouting | None = None  # their mean, once they are
        self._finished = torch.zeros(())
        self._pace = Pace()
        self._guess: DraftHead | None = None
        self._began = 0.0  # when the last token began
        self._kind: deque[float] | None = None  # where its seconds belong

    def step(self, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """One token of each row, as the model's forward would read it; None where the model itself has to.

        Calls of the model that do not continue this generation's cache are none of the session's business.

        Args:
            call: the model's own forward.
            inputs: its arguments.
        """
        tokens = inputs.get("input_ids")
        if inputs.get("past_key_values") is not self.cache or not isinstance(tokens, Tensor):
            return None
        if tokens.shape[1:] != (1,) or (self._store is None and not self._begin(inputs)):
            self.end()
            return None
        store = cast(RowCache, self._store)
        positions = inputs["position_ids"].expand(len(tokens), -1)
        self._note()
        out, self._kind = self._way()(call, inputs, tokens, positions, store)
        if self.ends is not None:  # only now: the token that ends a row is read as it is
            self._finished = self._finished | torch.isin(tokens[:, 0], self.ends)
        self._length += 1
        self.report.tokens += 1
        out.past_key_values = self.cache
        return out

    def end(self) -> None:
        """Hand the keys and values back to the cache that they were taken from.

        Once the routing is fixed there is no scaling pass to go on with: the cache becomes a plain one.
        """
        if self._store is not None:
            self._store.hand_back(self._length)
            self.cache.torn = False
            if self._kept is not None:
                self.cache.separate()
        self._store = self._ahead = self._kind = None

    def _begin(self, inputs: Mapping[str, Any]) -> bool:
        self.report.reason = why_not_this_token(self.model, self.state, inputs)
        if self.report.reason is not None:
            return False
        cache = TwoPassCache.adopt(self.cache, self.state.owner)
        mask, batch = inputs.get("attention_mask"), len(inputs["input_ids"])
        padded = mask is not None and not bool(mask.all())
        self._store = RowCache(cache, batch, mask if padded else None)
        self._length = cache.get_seq_length()
        self._finished = torch.zeros(batch, dtype=torch.bool, device=inputs["input_ids"].device)
        self._pace = self.state.paces.setdefault(batch, Pace())
        self._guess = self._draft_head()
        cache.torn = True
        return True

    def _draft_head(self) -> DraftHead | None:
        """A cheaper head to guess with, made once for each state of the head's weights."""
        head = self.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        version = None if weight is None else (id(weight), None if weight.is_inference() else weight._version)
        kept = self.state.draft_head
        if kept is None or kept[0] != version:
            kept = self.state.draft_head = (version, DraftHead.of(head))
        return kept[1]

    def _note(self) -> None:
        """How long the last token took, from its beginning to this one's."""
        now = time.perf_counter()
        if self._kind is not None:
            self._kind.append(now - self._began)
        self._began = now

    def _apart(
        self, call: Callable[..., Any], inputs: Mapping[str, Any], tokens: Tensor, positions: Tensor, store: RowCache
    ) -> tuple[Any, deque[float] | None]:
        """The scaling pass, without the head, then the mixture pass."""
        batch, slot, self._ahead = store.batch, self._length, None
        hidden = self._run(self.model.base_model, tokens, positions, (slice(0, batch), slot))[0]
        routing = self._routing(hidden, inputs)
        out = self._run(call, tokens, positions, (slice(batch, 2 * batch), slot), routing=routing)[1]
        self.report.forwards += 2
        return out, self._pace.apart

    def _together(
        self, call: Callable[..., Any], inputs: Mapping[str, Any], tokens: Tensor, positions: Tensor, store: RowCache
    ) -> tuple[Any, deque[float] | None]:
        """The scaling pass of the draft of the next token beside the mixture pass of this one."""
        batch, slot, known = store.batch, self._length, self._ahead
        config = cast(Any, self.state.config)
        settings = config.scaling_pass_value, config.global_scaling_weight
        if known is not None and known.settings != settings:
            known = None
        right = known is not None and bool(((known.token == tokens[:, 0]) | self._finished).all())
        if known is not None:
            self.report.drafts += 1
            self.report.right += right
            self._pace.drafts.append(right)
        if known is None or not right:
            reads = call if self._guess is None else self.model.base_model
            hidden, out = self._run(reads, tokens, positions, (slice(0, batch), slot))
            known = _Ahead(settings, tokens[:, 0], hidden, self._next(hidden, out))
            self.report.forwards += 1
        kind = self._pace.right if right else self._pace.wrong
        made = self._routing(known.hidden, inputs)
        both = torch.cat([known.next[:, None], tokens])
        places = torch.cat([positions + 1, positions])
        writes = ((slice(0, batch), slot + 1), (slice(batch, 2 * batch), slot))
        to_head = None if self._guess is None else slice(batch, 2 * batch)
        hidden, out = self._run(call, both, places, *writes, routing=self._beside(made), to_head=to_head)
        self.report.forwards += 1
        self._ahead = _Ahead(settings, known.next, hidden[:batch], self._next(hidden[:batch], out))
        out.logits = out.logits[-batch:]
        return out, kind

    def _next(self, hidden: Tensor, out: Any) -> Tensor:
        """The scaling pass's guess of the token after each of its rows, which are the first in `out`."""
        if self._guess is not None:
            return self._guess(hidden[:, -1])
        return out.logits[: len(hidden), -1].argmax(-1)

    def _fixed(
        self, call: Callable[..., Any], inputs: Mapping[str, Any], tokens: Tensor, positions: Tensor, store: RowCache
    ) -> tuple[Any, deque[float] | None]:
        """The mixture pass alone, with the scalings that each row has kept."""
        rows = (slice(store.batch, 2 * store.batch), self._length)
        out = self._run(call, tokens, positions, rows, routing=cast(TensorRouting, self._kept))[1]
        self.report.forwards += 1
        return out, None

    def _way(self) -> Callable[..., tuple[Any, deque[float] | None]]:
        if self._kept is not None:
            return self._fixed
        together = self._pace.choose() if self.wanted is None else self.wanted
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        ends = positions is not None and self._length + 1 >= positions  # a draft would stand behind the last position
        return self._together if together and not ends else self._apart

    def _routing(self, hidden: Tensor, inputs: Mapping[str, Any]) -> TensorRouting:
        routing = self.state.mixture_pass(hidden, inputs, False)[0]
        after = self.state.fixed_after
        if after is not None:
            self._sum = routing.scalings if self._sum is None else self._sum + routing.scalings
            if self.report.tokens + 1 == after:
                self._kept = self.state.routing(self._sum / after)
        return routing

    def _beside(self, made: TensorRouting) -> TensorRouting:
        """The scaling pass's rows, with every expert at its value, before the mixture pass's."""
        value = cast(Any, self.state.config).scaling_pass_value
        return self.state.routing(torch.cat([torch.full_like(made.scalings, value), made.scalings]))

    def _run(
        self,
        call: Callable[..., Any],
        tokens: Tensor,
        positions: Tensor,
        *writes: tuple[slice, int],
        routing: Routing | None = None,
        to_head: slice | None = None,
    ) -> tuple[Tensor, Any]:
        """One forward over some of the rows: the last hidden states, and what the model returned for `to_head`."""
        store = cast(RowCache, self._store)
        store.write(*writes)
        watched = Watched(routing or self.state.scaling_pass(), to_head)
        with override(self.state, lambda: watched):
            out = call(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=store.masks(self.model.dtype, tokens.device),
                past_key_values=store,
                use_cache=True,
                return_dict=True,
            )
        return cast(Tensor, watched.hidden), out


@dataclass
class Request:
    """One call of `generate`.

    Attributes:
        wanted: lockstep (True), two passes (False), or neither said (None).
        report: how it decodes; None where transformers takes a way of its own, such as beams.
        running: whether it is under way; not so for what stands in where no call is.
        prompt: tokens of each row that it was given; those after them it makes, and pads rows that have finished.
        padding: the token that it pads with; None where no row can finish before the others.
        ends: tokens after which a row has finished.
    """

    wanted: bool | None = None
    report: LockstepReport | None = None
    running: bool = False
    prompt: int = 0
    padding: int | None = None
    ends: frozenset[int] = frozenset()

    def pads(self, prompt: int, generation_config: Any) -> None:
        """Note how rows that have finished are padded.

        Args:
            prompt: tokens of each row that were given.
            generation_config: transformers', complete.
        """
        ends = getattr(generation_config, "_eos_token_tensor", None)
        padding = getattr(generation_config, "_pad_token_tensor", None)
        self.prompt = prompt
        if ends is not None and padding is not None:
            self.padding, self.ends = int(padding), frozenset(ends.flatten().tolist())


class _Current(threading.local):
    def __init__(self) -> None:
        self.session: Lockstep | None = None
        self.request = Request()


_current = _Current()


def session_of(state: MixtureState) -> Lockstep | None:
    """The generation of this thread that decodes a model in lockstep."""
    session = _current.session
    return session if session is not None and session.state is state else None


@contextmanager
def decoding(session: Lockstep) -> Generator[None]:
    """Inside, in this thread, the session reads single tokens in the model's place."""
    outer, _current.session = _current.session, session
    try:
        yield
    finally:
        _current.session = outer
        session.end()


@contextmanager
def paused() -> Generator[None]:
    """Inside, the model's forward is its own."""
    outer, _current.session = _current.session, None
    try:
        yield
    finally:
        _current.session = outer


@contextmanager
def asked(wanted: bool | None) -> Generator[Request]:
    """Inside, in this thread, `generate` runs, and was asked for lockstep or not."""
    outer, _current.request = _current.request, Request(wanted, running=True)
    try:
        yield _current.request
    finally:
        _current.request = outer


def request() -> Request:
    """The innermost call of `generate` in this thread."""
    return _current.request


def wanted_by(generation_config: Any, wanted: bool | None) -> bool | None:
    """What the call asked for, else what the generation's configuration says."""
    return getattr(generation_config, "lockstep", None) if wanted is None else wanted


_told: set[str] = set()


def tell(reason: str, asked_for: str = "lockstep=True") -> None:
    """Say once why what was asked for did not happen."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"{asked_for}, but the two passes run one after the other: {reason}.", stacklevel=3)
