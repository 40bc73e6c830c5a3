"""The decoding of one generation: transformers' own loop calls the model, and a session computes the single tokens.

The session moves the prompt's keys and values of both passes into one store. From then on it computes each token with
the selected strategy. At the end it writes the keys and values back: the cache then holds what it would hold after
sequential decoding.

B, T: batch, tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loramix._compat import CACHE
from loramix.decoding.acceptance import SCALING_PASS, TEXT
from loramix.decoding.choice import Automatic, Choice
from loramix.decoding.eligibility import why_not_this_token
from loramix.decoding.forwards import Forwards
from loramix.decoding.ngrams import NGramIndex
from loramix.decoding.report import LockstepReport
from loramix.decoding.row_cache import RowCache
from loramix.decoding.scheduler import Measurements, Preference, Scheduler, Selector
from loramix.decoding.state import DecodingState, RunningMean, Step
from loramix.decoding.strategies import DRAFTING, DraftingStrategy, Fixed, Lockstep, Sequential, Strategy
from loramix.experts.base_model import positions_of
from loramix.passes.cache import TwoPassCache
from loramix.passes.state import MixtureState

ENDLESS = 2**31  # tokens of a generation whose length is not known


class Session:
    """One generation. It owns its cache until it ends.

    Args:
        model: the mixture.
        mixture: its state.
        choice: how to decode. With `Sequential` there is a session only to fix the routing after some tokens.
        cache: the cache that this generation fills; calls with another one are left to the model.
        prompt: (B, T).
        new: the number of tokens to generate; None if it is not known.
        ends: the end-of-sequence ids. A row that has ended accepts every draft, so its logits and its keys and values
            may then differ from sequential decoding. None if these can be observed; then no row counts as ended.
    """

    def __init__(
        self,
        model: Any,
        mixture: MixtureState,
        choice: Choice,
        cache: Any,
        prompt: Int[Tensor, "B T"],
        *,
        new: int | None = None,
        ends: Tensor | None = None,
    ) -> None:
        self.model, self.mixture, self.choice, self.cache = model, mixture, choice, cache
        self.prompt, self.new, self.ends = prompt, new, ends
        self.report = LockstepReport()
        self._decoder: _Decoder | None = None  # once the prompt has been read

    def step(self, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """Compute one token of each row, as the model's forward would; None if the model's own forward must run.

        It must for the prompt, where drafts may not be used, and for calls that do not continue this generation's
        cache.

        Args:
            call: the model's own forward.
            inputs: its arguments.
        """
        ids = inputs.get("input_ids")
        if inputs.get(CACHE) is not self.cache or not isinstance(ids, Tensor):
            return None
        switched = self._decoder is not None and self.mixture.single_pass() is not None
        if switched or ids.shape[1:] != (1,):
            self.end()
            return None
        if self._decoder is None:
            self._decoder = self._begin(inputs)
        if self._decoder is None:
            return None
        step = Step(call, inputs, ids, inputs["position_ids"].expand(len(ids), -1))
        out = self._decoder.step(step, self.ends)
        setattr(out, CACHE, self.cache)
        return out

    def end(self) -> None:
        """Write keys and values back to the cache.

        If the routing has been fixed, there is no scaling pass to continue: the cache becomes a plain one.
        """
        if self._decoder is None:
            return
        state = self._decoder.state
        self._decoder.selector.end()
        state.store.hand_back(state.length)
        self.cache.torn = False
        if state.fixed is not None:
            self.cache.separate()
        self._decoder = None

    def _begin(self, inputs: Mapping[str, Any]) -> _Decoder | None:
        """Take over the cache; None while the prompt is still being read, and where drafts may not be used."""
        if self.cache.get_seq_length() < self.prompt.shape[1]:
            return None
        self.report.reason = why_not_this_token(self.model, self.mixture, inputs)
        if self.report.reason is not None:
            return None
        cache = TwoPassCache.adopt(self.cache, self.mixture.owner)
        ids, mask, length = inputs["input_ids"], inputs.get("attention_mask"), cache.get_seq_length()
        padded = mask is not None and not bool(mask.all())
        positions, after = positions_of(self.model.config), self.mixture.fixed_after
        state = DecodingState(
            store=RowCache(cache, len(ids), mask if padded else None),
            length=length,
            stop=length + (ENDLESS if self.new is None else self.new),
            last_position=None if positions is None else positions - 1,
            finished=torch.zeros(len(ids), dtype=torch.bool, device=ids.device),
            report=self.report,
            fixing=None if after is None else RunningMean(after),
        )
        cache.torn = True
        forwards = Forwards(self.model, self.mixture, state)
        strategies = DRAFTING if isinstance(self.choice, Automatic) else _in_turn(self.choice)
        drafters = {one.drafter for one in strategies if isinstance(one, DraftingStrategy)}
        if state.batch == 1 and TEXT in drafters:
            state.text = NGramIndex(self.prompt[0, :length].tolist())
        if not isinstance(self.choice, Automatic):
            return _Decoder(state, forwards, Preference(state, strategies))
        key = (state.batch, self.model.device, self.model.dtype)
        measurements = self.mixture.measurements.setdefault(key, Measurements())
        return _Decoder(state, forwards, Scheduler(state, forwards, measurements))


def _in_turn(choice: Sequential | DraftingStrategy) -> Sequence[Strategy]:
    """The strategies of an explicit choice: the first that is ready computes the token."""
    return (choice,) if isinstance(choice, Sequential) else (choice, Lockstep(), Sequential())


class _Decoder:
    """A session after the prompt: the state, and what reads and changes it."""

    def __init__(self, state: DecodingState, forwards: Forwards, selector: Selector) -> None:
        self.state, self.forwards, self.selector = state, forwards, selector

    def step(self, step: Step, ends: Tensor | None) -> Any:
        """The model's output for one token of each row."""
        state, mixture = self.state, self.forwards.mixture
        state.observed = bool(mixture.hooks) or mixture.log.enabled or state.fixing is not None
        self.selector.observe(step.ids)
        state.unscored = None
        if state.text is not None:
            state.text.add(int(step.ids))
        out = self._computed_ahead(step.ids)
        if out is None:
            out = self._round(step)
        if ends is not None:  # only now: the token that ends a row is still computed exactly
            state.finished = state.finished | torch.isin(step.ids[:, 0], ends)
        state.length += 1
        state.report.tokens += 1
        return out

    def _computed_ahead(self, ids: Int[Tensor, "B 1"]) -> Any:
        """The output for these tokens from the window; None if it holds others, which discards it."""
        state = self.state
        window, state.window = state.window, None
        if window is None or window.settings != self.forwards.mixture.settings():
            return None
        if state.verify(window.draft, ids, window.drafter):
            return None
        return self.forwards.take(window)

    def _round(self, step: Step) -> Any:
        """Compute a token, and perhaps more, with the selected strategy."""
        state, ahead = self.state, self.state.ahead
        if ahead is not None and ahead.settings != self.forwards.mixture.settings():
            ahead = state.ahead = None
        state.rejected = []
        if ahead is not None:
            state.rejected = state.verify(ahead.token, step.ids, SCALING_PASS)
        strategy = Fixed() if state.fixed is not None else self.selector.select()
        state.report.rounds[strategy.name] += 1
        round = strategy.run(step, state, self.forwards)
        if state.ahead is ahead:  # not renewed, so no longer ahead
            state.ahead = None
        if not isinstance(strategy, Fixed):
            self.selector.ran(strategy, round)
        return round.out
