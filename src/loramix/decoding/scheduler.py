"""Choose the strategy for each token: the one that is expected to be the cheapest.

A strategy's price for a token is the time of its rounds, measured as they run, divided by the expected number of tokens
of a round at the estimated acceptance of its drafts (`acceptance`). The acceptance can be estimated before any draft is
computed. A strategy that has not run yet is priced by the forwards of its rounds, at their cost on common hardware.

Estimates can be wrong, as at the beginning of another text. So a round may run only if the row-forwards that it would
waste with all drafts rejected are within an allowance: at first one for each row of the batch, then also a small share
of those made so far, and more for each accepted draft.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from loramix.decoding.acceptance import ENOUGH, TEXT
from loramix.decoding.forwards import Forwards
from loramix.decoding.state import DecodingState
from loramix.decoding.strategies import DRAFTING, DraftingStrategy, Sequential, Strategy
from loramix.decoding.strategies.base import Round

WIDE = 1.25  # assumed time of a forward over several tokens or both passes, over that of one token's
SAMPLES = 3  # rounds before their time is a price
FRESH = 256  # rounds after which the two passes are measured again: every other price is compared with theirs
ALLOWANCE = 0.02  # of the row-forwards made so far
CREDIT = 14  # row-forwards of allowance for each right draft: a round of seven drafts, all rejected
FIRST_WAIT, LONGEST_WAIT = 32, 1024  # rounds after which a strategy that was too slow is measured again


def _seconds() -> deque[float]:
    return deque(maxlen=9)


@dataclass
class RoundTimes:
    """How long the rounds of one strategy take.

    Attributes:
        seconds: of the latest rounds, without forwards to recover from rejected drafts.
        wait: rounds after which the times are forgotten if another strategy is cheaper; doubled each time.
        waited: how many of these rounds have passed.
    """

    seconds: deque[float] = field(default_factory=_seconds)
    wait: int = FIRST_WAIT
    waited: int = 0

    @property
    def typical(self) -> float | None:
        """The lower quartile: other work on the machine only makes rounds longer. None while there are too few."""
        known = sorted(self.seconds)  # a copy: other threads measure too
        return known[len(known) // 4] if len(known) >= SAMPLES else None

    def pass_over(self) -> None:
        """Count a round of a cheaper strategy; after `wait` of them the times are forgotten, and measured again."""
        self.waited += 1
        if self.waited >= self.wait:
            self.wait, self.waited = min(2 * self.wait, LONGEST_WAIT), 0
            self.seconds.clear()


@dataclass
class Measurements:
    """Measurements of one model at one batch size, on one device and in one dtype, shared by its generations.

    Attributes:
        times: of each strategy's rounds.
        acceptance: the estimate at the end of the last generation, for each drafter.
        age: rounds since the two passes were measured.
    """

    times: dict[Strategy, RoundTimes] = field(default_factory=dict[Strategy, RoundTimes])
    acceptance: dict[str, float] = field(default_factory=dict[str, float])
    age: int = 0

    def of(self, strategy: Strategy) -> RoundTimes:
        """A strategy's times."""
        return self.times.setdefault(strategy, RoundTimes())

    @property
    def token(self) -> float | None:
        """Seconds per token of sequential decoding; None while it must be measured."""
        return self.of(Sequential()).typical

    def price(self, strategy: DraftingStrategy, acceptance: float, token: float) -> float:
        """Expected seconds per token."""
        return self._price(strategy, acceptance, token, self.of(strategy).typical)

    def assumed_price(self, strategy: DraftingStrategy, acceptance: float, token: float) -> float:
        """The same as if no round had been measured."""
        return self._price(strategy, acceptance, token, None)

    @staticmethod
    def _price(strategy: DraftingStrategy, acceptance: float, token: float, measured: float | None) -> float:
        single, wide = strategy.forwards
        seconds = token / 2 * (single + WIDE * wide) if measured is None else measured
        return (seconds + token / 2 * strategy.recoveries(acceptance)) / strategy.tokens(acceptance)


@runtime_checkable
class Selector(Protocol):
    """Selects the strategy for each round."""

    def observe(self, ids: Tensor) -> None:
        """Called with the chosen tokens (B, 1), before anything is computed for them."""

    def select(self) -> Strategy:
        """The strategy of the round that begins now."""
        ...

    def ran(self, strategy: Strategy, round: Round) -> None:
        """Called after it has run."""

    def end(self) -> None:
        """Called when the generation ends."""


class Preference:
    """The first strategy of a list that is ready.

    Args:
        state: the generation's.
        strategies: the last is always ready.
    """

    def __init__(self, state: DecodingState, strategies: Sequence[Strategy]) -> None:
        self.state, self.strategies = state, strategies

    def observe(self, ids: Tensor) -> None: ...

    def select(self) -> Strategy:
        return next(strategy for strategy in self.strategies if strategy.is_ready(self.state))

    def ran(self, strategy: Strategy, round: Round) -> None: ...

    def end(self) -> None: ...


class Scheduler:
    """The cheapest strategy.

    Args:
        state: the generation's.
        forwards: its forwards.
        known: the measurements of the model.
    """

    def __init__(self, state: DecodingState, forwards: Forwards, known: Measurements) -> None:
        self.state, self.forwards, self.known = state, forwards, known
        self._began = 0.0
        self._running: tuple[Strategy, int] | None = None  # the running round, if it is typical, and its recoveries
        for one in DRAFTING:
            prior = one.prior(forwards)
            state.acceptance_of(one.drafter).prior = known.acceptance.get(one.drafter) if prior is None else prior

    def observe(self, ids: Tensor) -> None:
        for strategy in DRAFTING:
            strategy.compare(ids, self.state, self.forwards)

    def select(self) -> Strategy:
        self._note_time()
        strategy = self._cheapest()
        self.known.age = 0 if isinstance(strategy, Sequential) else self.known.age + 1
        return strategy

    def ran(self, strategy: Strategy, round: Round) -> None:
        self._running = (strategy, round.recoveries) if round.is_typical else None

    def end(self) -> None:
        for drafter, found in self.state.acceptance.items():
            if found.rate is not None and len(found.recent) >= ENOUGH:
                self.known.acceptance[drafter] = found.rate

    def _note_time(self) -> None:
        """The time of the last round, from its beginning to this one's."""
        now = time.perf_counter()
        if self._running is not None:
            strategy, recoveries = self._running
            token = self.known.token
            if recoveries == 0 or token is not None:
                seconds = now - self._began - recoveries * (token or 0.0) / 2
                self.known.of(strategy).seconds.append(seconds)
        self._began, self._running = now, None

    def _cheapest(self) -> Strategy:
        known = self.known
        if known.age >= FRESH:
            known.of(Sequential()).seconds.clear()
        token = known.token
        if token is None:
            return Sequential()
        rates = {strategy: self.state.acceptance_of(strategy.drafter).rate for strategy in DRAFTING}
        offers = {
            strategy: rate
            for strategy, rate in rates.items()
            if rate is not None and strategy.is_ready(self.state) and self._is_affordable(strategy)
        }
        prices: dict[Strategy, float] = {one: known.price(one, rate, token) for one, rate in offers.items()}
        cheapest = min(prices, key=prices.__getitem__, default=Sequential())
        lowest = prices.get(cheapest, token)
        if lowest >= token:
            cheapest, lowest = Sequential(), token
        for strategy, rate in offers.items():
            if strategy != cheapest and known.assumed_price(strategy, rate, token) < lowest:
                known.of(strategy).pass_over()
        return cheapest

    def _is_affordable(self, strategy: DraftingStrategy) -> bool:
        """Whether a round is within the allowance even if all its drafts are rejected."""
        state, report = self.state, self.state.report
        allowance = max(state.batch, int(ALLOWANCE * report.row_forwards))
        right = report.accepted_drafts + state.acceptance_of(TEXT).right
        return state.excess + strategy.row_forwards_at_risk * state.batch <= allowance + CREDIT * right
