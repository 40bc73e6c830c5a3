"""One forward per token: the scaling pass runs one token ahead, in the same forward as the mixture pass.

The scaling pass is a run of the base model, and scalings belong to rows and tokens. So a batch of 2 B rows holds both
passes: in rows 0 … B-1 the scaling pass reads its own greedy draft of the next token, in rows B … 2 B - 1 the mixture
pass reads the current one, with the scalings that the scaling pass made for it one step before. A draft that is the
token which was chosen then leaves nothing to do; another one costs a forward of the scaling pass alone. A token costs
1 + (share of wrong drafts) forwards, against 2, and no token differs from two passes one after the other: a draft
decides about work, never about text.

Both passes write into one store of keys and values by row and slot. A wrong draft's slot is written again, so nothing
is cropped, and windows of attention, counted in slots, stay what they are.

Where more rows of a matrix product cost little more than two, as on many a CPU, it is cheaper to run the scaling pass
k tokens ahead, one after the other, and then the mixture pass over all k + 1 tokens at once. And where the text has
said before what it says now, its own words are drafts that cost nothing: each pass reads them in one forward. What
the mixture pass has read ahead is served as long as it is what is chosen.

Which way is the cheapest depends on the machine, the vocabulary (a draft needs the head), and the text (how often
drafts are right). It is measured while it runs (`pace.py`).

B, T: batch, tokens so far. k: drafts. E: experts. L: adapted layers. V: vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor

from loramix.config.xlora import XLoraConfig
from loramix.decoding.draft_head import DraftHead
from loramix.decoding.drafts import Repeats, Window
from loramix.decoding.eligibility import why_not_this_token
from loramix.decoding.row_cache import RowCache, Write
from loramix.decoding.scheduler import AHEAD, Pace, Way
from loramix.errors import ConfigurationError
from loramix.experts.base_model import positions_of
from loramix.layers.scalings import Routing, TensorRouting, Watched, override
from loramix.passes.cache import TwoPassCache
from loramix.passes.two_pass import Mixed, MixtureState

Wanted = bool | int | Literal["lookup"] | None
"""How `generate` is to decode: see `LockstepMethods.generate`; a number is 2 or more."""


def as_wanted(value: object) -> Wanted:
    """What `lockstep` was set to.

    Raises:
        ConfigurationError: nothing that it may be.
    """
    if value is None or isinstance(value, bool):
        return value
    if value == "lookup":
        return "lookup"
    number = value.__index__() if isinstance(value, SupportsIndex) else -1
    if number < 0:
        raise ConfigurationError(
            "lockstep is True, False, None, a number of drafts, or 'lookup'.",
            received=f"lockstep={value!r}",
            remedy="leave it out: the cheapest way is found while the text is made",
        )
    return bool(number) if number < 2 else number


@dataclass
class LockstepReport:
    """What one generation did after its prompt.

    Attributes:
        tokens: read after the prompt, by each row.
        forwards: of the backbone, for either pass or for both at once.
        drafts: that were compared with the token which was chosen.
        right: of them, those that were it; each row counts.
        rounds: how often each way was taken (`pace.Way`).
        reason: why the two passes went one after the other all along, where they did.
    """

    tokens: int = 0
    forwards: int = 0
    drafts: int = 0
    right: int = 0
    rounds: Counter[str] = field(default_factory=Counter)
    reason: str | None = None

    @property
    def forwards_per_token(self) -> float:
        """2 one pass after the other; 1 + the share of wrong drafts in lockstep; less where the text repeats."""
        return self.forwards / self.tokens if self.tokens else float("nan")

    @property
    def accepted(self) -> float:
        """The share of right drafts."""
        return self.right / self.drafts if self.drafts else float("nan")


class _Token(NamedTuple):
    """What is to be read: one token of each row."""

    call: Callable[..., Any]  # the model's own forward
    inputs: Mapping[str, Any]  # its arguments
    ids: Tensor  # (B, 1)
    positions: Tensor  # (B, 1)


class _Ahead(NamedTuple):
    """What the scaling pass knows one token ahead: the hidden states of its draft, and the draft after it."""

    settings: tuple[object, ...]  # what it has read it with
    token: Tensor  # (B,): what it has read
    hidden: Tensor  # (B, 1, H)
    next: Tensor  # (B,): its guess of what follows


class Lockstep:
    """One generation's decoding, token by token; while it is under way, its cache belongs to it.

    Args:
        model: the mixture.
        state: its state.
        wanted: as `generate` takes it; False: not at all, but the routing may be fixed after some tokens.
        cache: the one that this generation fills; calls with another one are left to the model.
        text: (B, T) the prompt.
        new: tokens after which the generation ends; None if that is not known.
        ends: token ids after which a row is finished, and what its passes read does not matter any more; None where
            somebody could see it.
    """

    def __init__(
        self,
        model: Any,
        state: MixtureState,
        wanted: Wanted,
        cache: Any,
        text: Tensor,
        *,
        new: int | None = None,
        ends: Tensor | None = None,
    ) -> None:
        self.model, self.state, self.wanted, self.cache = model, state, wanted, cache
        self.text, self.new, self.ends = text, new, ends
        self.after = state.fixed_after
        self.report = LockstepReport()
        self._store: RowCache | None = None
        self._length = self._stop = 0
        self._ahead: _Ahead | None = None
        self._window: Window | None = None
        self._repeats: Repeats | None = None
        self._sum: Tensor | None = None  # of the scalings, while they are to be fixed
        self._kept: TensorRouting | None = None  # their mean, once they are
        self._finished = torch.zeros(())
        self._pace = Pace()
        self._began = 0.0  # when the last round began
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
        switched = self._store is not None and self.state.single_pass() is not None
        if switched or tokens.shape[1:] != (1,) or (self._store is None and not self._begin(inputs)):
            self.end()
            return None
        if self._repeats is not None:
            self._repeats.add(int(tokens))
        out = self._served(tokens)
        if out is None:
            self._note()
            out = self._read(_Token(call, inputs, tokens, inputs["position_ids"].expand(len(tokens), -1)))
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
        self._store = self._ahead = self._window = self._kind = None

    def _begin(self, inputs: Mapping[str, Any]) -> bool:
        """Take over; not while the prompt is read, in chunks of a token perhaps."""
        if self.cache.get_seq_length() < self.text.shape[1]:
            return False
        self.report.reason = why_not_this_token(self.model, self.state, inputs)
        if self.report.reason is not None:
            return False
        cache = TwoPassCache.adopt(self.cache, self.state.owner)
        mask, batch = inputs.get("attention_mask"), len(inputs["input_ids"])
        padded = mask is not None and not bool(mask.all())
        self._store = RowCache(cache, batch, mask if padded else None)
        self._length = cache.get_seq_length()
        self._stop = self._length + self.new if self.new is not None else self._length + 2**31
        self._finished = torch.zeros(batch, dtype=torch.bool, device=inputs["input_ids"].device)
        self._pace = self.state.paces.setdefault((batch, self.model.device, self.model.dtype), Pace())
        if batch == 1 and self.wanted in (None, "lookup"):
            self._repeats = Repeats(self.text[0, : self._length].tolist())
        cache.torn = True
        return True

    @cached_property
    def _guess(self) -> DraftHead | None:
        """A cheaper head to guess with, made once for each state of the head's weights."""
        head = self.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        version = None if weight is None else (id(weight), None if weight.is_inference() else weight._version)
        kept = self.state.draft_head
        if kept is None or kept[0] != version:
            kept = self.state.draft_head = (version, DraftHead.of(head))
        return kept[1]

    def _note(self) -> None:
        """How long the last round took, from its beginning to this one's."""
        now = time.perf_counter()
        if self._kind is not None:
            self._kind.append(now - self._began)
        self._began = now

    def _judge(self, outcomes: deque[bool], drafts: Tensor, tokens: Tensor) -> list[int]:
        """Compare drafts (B,) with the tokens (B, 1) that were chosen: the rows whose draft was another one."""
        wrong = ((drafts != tokens[:, 0]) & ~self._finished).nonzero()[:, 0].tolist()
        compared = len(drafts) - int(self._finished.sum())
        outcomes.append(not wrong)
        self.report.drafts += compared
        self.report.right += compared - len(wrong)
        return wrong

    def _served(self, tokens: Tensor) -> Any:
        """The answer for tokens that were read ahead; None where they were not."""
        window, self._window = self._window, None
        if window is None or window.settings != self._settings():
            return None
        if self._judge(window.outcomes, window.draft, tokens):
            return None
        out, scalings = window.serve()
        self.state.show(scalings)
        self._window = None if window.is_used_up else window
        return out

    def _read(self, token: _Token) -> Any:
        """Read what was not read ahead: a round, in one of the ways."""
        store = cast(RowCache, self._store)
        way, drafts = self._way()
        self.report.rounds[way] += 1
        if way != "together":
            self._ahead = None
        match way:
            case "fixed":
                rows = (slice(store.batch, 2 * store.batch), self._length)
                self._kind = None
                return self._run(token.call, token.ids, token.positions, rows, routing=self._kept)[1]
            case "together":
                return self._together(token, store)
            case "lookup":
                self._kind = self._pace.lookup if len(drafts) == AHEAD else None
                return self._mix(token, store, *self._guided(token, store, drafts), self._pace.found)
            case "ahead":
                self._kind = self._pace.ahead if len(drafts) == AHEAD else None
            case "apart":
                self._kind = self._pace.apart
        return self._mix(token, store, *self._alone(token, store, len(drafts)), self._pace.drafts)

    def _way(self) -> tuple[Way | Literal["fixed"], Sequence[int]]:
        """How to read the next token, and with which drafts; where the model makes them only their number counts."""
        if self._kept is not None:
            return "fixed", ()
        longest = positions_of(self.model.config)
        room = AHEAD if longest is None else longest - 1 - self._length  # drafts stand before the last position
        left = min(room, self._stop - 2 - self._length)  # and are not read in vain
        state, wanted = self.state, self.wanted
        watched = bool(state.hooks) or state.log.enabled or self.after is not None
        most = wanted if isinstance(wanted, int) else AHEAD
        count = 0 if watched else max(0, min(left, most))
        repeated = self._repeats.drafts(count) if self._repeats is not None else ()
        if wanted is None:
            way = self._pace.choose(drafts=count, repeats=bool(repeated))
        elif wanted == "lookup":
            way = "lookup" if repeated else "together"
        elif wanted is False:
            way = "apart"
        else:
            way = "ahead" if count > 1 else "together"
        if way == "together" and room < 1:
            way = "apart"
        return way, repeated if way == "lookup" else range(count) if way == "ahead" else ()

    def _alone(self, token: _Token, store: RowCache, count: int) -> tuple[Tensor, Tensor]:
        """The scaling pass of the token, and of `count` drafts of its own: these, and the hidden states at all."""
        rows, read, seen = slice(0, store.batch), [token.ids], []
        for i in range(count + 1):
            needs_logits = i < count and self._guess is None
            reads = token.call if needs_logits else self.model.base_model
            hidden, out = self._run(reads, read[-1], token.positions + i, (rows, self._length + i))
            seen.append(hidden)
            if i < count:
                read.append(self._next(hidden, out)[:, None])
        return torch.cat(read[1:], 1) if count else token.ids[:, :0], torch.cat(seen, 1)

    def _guided(self, token: _Token, store: RowCache, drafts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The scaling pass of the token and of drafts that are known, in one forward."""
        ids = token.ids.new_tensor([drafts])
        both = torch.cat([token.ids, ids], 1)
        return ids, self._run(self.model.base_model, both, _places(token, both), (slice(0, 1), self._length))[0]

    def _mix(self, token: _Token, store: RowCache, drafts: Tensor, hidden: Tensor, outcomes: deque[bool]) -> Any:
        """The mixture pass of the token and of the drafts after it."""
        batch = store.batch
        made = self._made(hidden, token.inputs)
        both = torch.cat([token.ids, drafts], 1)
        out = self._run(
            token.call, both, _places(token, both), (slice(batch, 2 * batch), self._length), routing=made.routing
        )[1]
        if drafts.shape[1]:
            self._window = Window(drafts, out, made.activated, outcomes, self._settings())
            out, scalings = self._window.serve()
            self.state.show(scalings)
        return out

    def _together(self, token: _Token, store: RowCache) -> Any:
        """The scaling pass of the draft of the next token beside the mixture pass of this one."""
        batch, slot, known, tokens = store.batch, self._length, self._ahead, token.ids
        if known is not None and known.settings != self._settings():
            known = None
        wrong = range(batch) if known is None else self._judge(self._pace.drafts, known.token, tokens)
        if wrong:
            known = self._again(token, store, wrong, known)
        assert known is not None
        self._kind = self._pace.wrong if wrong else self._pace.right
        made = self._made(known.hidden, token.inputs).routing
        both = torch.cat([known.next[:, None], tokens])
        places = torch.cat([token.positions + 1, token.positions])
        writes = ((slice(0, batch), slot + 1), (slice(batch, 2 * batch), slot))
        to_head = None if self._guess is None else slice(batch, 2 * batch)
        hidden, out = self._run(token.call, both, places, *writes, routing=self._beside(made), to_head=to_head)
        self._ahead = _Ahead(known.settings, known.next, hidden[:batch], self._next(hidden[:batch], out))
        out.logits = out.logits[-batch:]
        return out

    def _again(self, token: _Token, store: RowCache, rows: Sequence[int], known: _Ahead | None) -> _Ahead:
        """The scaling pass of the token itself, in the rows that have read another one."""
        every = len(rows) == store.batch
        chosen = slice(0, store.batch) if every else torch.tensor(rows, device=token.ids.device)
        reads = token.call if self._guess is None else self.model.base_model
        hidden, out = self._run(reads, token.ids[chosen], token.positions[chosen], (chosen, self._length))
        after = self._next(hidden, out)
        if every or known is None:
            return _Ahead(self._settings(), token.ids[:, 0], hidden, after)
        assert isinstance(chosen, Tensor)
        parts = known.hidden.index_copy(0, chosen, hidden), known.next.index_copy(0, chosen, after)
        return _Ahead(known.settings, token.ids[:, 0], *parts)

    def _next(self, hidden: Tensor, out: Any) -> Tensor:
        """The scaling pass's guess of the token after each of its rows, which are the first in `out`."""
        if self._guess is not None:
            return self._guess(hidden[:, -1])
        return out.logits[: len(hidden), -1].argmax(-1)

    def _settings(self) -> tuple[object, ...]:
        """What tokens are read with, and may be changed by hand between them."""
        config = cast(XLoraConfig, self.state.config)
        return (
            config.scaling_pass_value,
            config.global_scaling_weight,
            config.top_k_lora,
            config.enable_softmax,
            config.enable_softmax_topk,
            config.softmax_temperature,
            self.state.hooks,
            self.state.log.enabled,
        )

    def _made(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Mixed:
        """The scalings of the mixture pass; their mean is kept, once the routing is to be fixed."""
        made = self.state.mixture_pass(hidden, inputs, False)
        if self.after is not None:
            scalings = made.routing.scalings
            self._sum = scalings if self._sum is None else self._sum + scalings
            if self.report.tokens + 1 == self.after:
                self._kept = self.state.routing(self._sum / self.after)
        return made

    def _beside(self, made: TensorRouting) -> TensorRouting:
        """The scaling pass's rows, with every expert at its value, before the mixture pass's."""
        value = cast(XLoraConfig, self.state.config).scaling_pass_value
        return self.state.routing(torch.cat([torch.full_like(made.scalings, value), made.scalings]))

    def _run(
        self,
        call: Callable[..., Any],
        tokens: Tensor,
        positions: Tensor,
        *writes: Write,
        routing: Routing | None = None,
        to_head: slice | None = None,
    ) -> tuple[Tensor, Any]:
        """One forward over some of the rows: the last hidden states, and what the model returned for `to_head`."""
        store = cast(RowCache, self._store)
        store.write(self._length, tokens.shape[1], *writes)
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
        self.report.forwards += 1
        return cast(Tensor, watched.hidden), out


def _places(token: _Token, ids: Tensor) -> Tensor:
    """(B, n): the positions of the token and of those after it."""
    return token.positions + torch.arange(ids.shape[1], device=ids.device)
