"""Which way of decoding is the cheapest: measured while it runs, from the seconds that tokens took.

    apart     the two passes one after the other
    together  both in one forward, the scaling pass one token ahead (lockstep)
    ahead     the scaling pass k tokens ahead, one after the other, then one forward of the mixture pass over all
    lookup    k tokens ahead that the text has said before, one forward for each pass

With the share p of right drafts, `ahead` and `lookup` are expected to give (1 - p^(k+1)) / (1 - p) tokens a round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

Way = Literal["apart", "together", "ahead", "lookup"]

AHEAD = 7  # k: with the token before them, eight rows cost a matrix product little more than two (docs/benchmarks.md)
SAMPLES = 4  # tokens, or drafts, before a way is judged
FIRST_WAIT, LONGEST_WAIT = 32, 1024  # tokens between trials
FRESH = 256  # tokens after which the two passes are measured again: what all else is compared with


def _seconds() -> deque[float]:
    return deque(maxlen=9)


def _drafts() -> deque[bool]:
    return deque(maxlen=24)


def expected(share: float, count: int) -> float:
    """Tokens that a round with `count` drafts gives: the one that is known, and each draft that all before led to."""
    return sum(share**i for i in range(count + 1))


@dataclass
class Trials:
    """When a way that did not pay is tried again: less and less often; it may pay on other text.

    Args:
        size: rounds of a trial.

    Attributes:
        wait: tokens until the next trial, doubled by each one that failed.
        waited: of them, those that have passed.
        left: rounds that are left of a trial.
    """

    size: int
    wait: int = FIRST_WAIT
    waited: int = 0
    left: int = 0

    def go(self, pays: bool | None, forget: deque[bool] | None = None) -> bool:
        """Whether to take the way now: it pays, or that is not known, or it is tried again.

        Args:
            pays: as far as is known.
            forget: what a trial shall find out anew.
        """
        if self.left:
            self.left -= 1
            if not self.left and pays is False:
                self.wait, self.waited = min(2 * self.wait, LONGEST_WAIT), 0
            return True
        if pays is False:
            self.waited += 1
            if self.waited < self.wait:
                return False
            self.left = self.size - 1
            if forget is not None:
                forget.clear()
        elif pays:
            self.wait = FIRST_WAIT
        return True


@dataclass
class Pace:
    """Seconds each way, and how often drafts were right: what decides between the ways.

    Attributes:
        apart: of the last tokens with the passes one after the other.
        right: of the last ones in lockstep that a right draft had prepared.
        wrong: of the last ones in lockstep that cost a forward more.
        ahead: of the last rounds with `AHEAD` drafts of the scaling pass.
        lookup: of the last rounds with `AHEAD` drafts from the text.
        drafts: whether the last drafts of the scaling pass were right.
        found: whether the last drafts from the text were.
        age: rounds since the two passes were measured.
    """

    apart: deque[float] = field(default_factory=_seconds)
    right: deque[float] = field(default_factory=_seconds)
    wrong: deque[float] = field(default_factory=_seconds)
    ahead: deque[float] = field(default_factory=_seconds)
    lookup: deque[float] = field(default_factory=_seconds)
    drafts: deque[bool] = field(default_factory=_drafts)
    found: deque[bool] = field(default_factory=_drafts)
    age: int = 0
    together_again: Trials = field(default_factory=lambda: Trials(6))
    ahead_again: Trials = field(default_factory=lambda: Trials(2))
    lookup_again: Trials = field(default_factory=lambda: Trials(3))

    def choose(self, *, drafts: int, repeats: bool) -> Way:
        """The way to read the next token.

        The first tokens measure the ways. One that does not pay is tried again, but less and less often, so that
        trying costs little in the end.

        Args:
            drafts: how many tokens may be read ahead.
            repeats: whether the text has said before what it says now.
        """
        way = self._cheapest(drafts, repeats)
        self.age = 0 if way == "apart" else self.age + 1
        return way

    def _cheapest(self, drafts: int, repeats: bool) -> Way:
        if self.age >= FRESH:
            self.apart.clear()
        if len(self.apart) < SAMPLES:
            return "apart"
        lookup, ahead = self._lookup(), self._ahead()
        if repeats and _is_measured(lookup, drafts) and self.lookup_again.go(self._pays(lookup), self.found):
            return "lookup"
        if self._promises() and _is_measured(ahead, drafts) and self.ahead_again.go(self._pays(ahead)):
            return "ahead"
        return "together" if self.together_again.go(self.pays(), self.drafts) else "apart"

    def pays(self) -> bool | None:
        """Whether lockstep is cheaper than the two passes; None while too little is known."""
        together = self._together()
        return None if together is None else together < median(_now(self.apart))

    def _pays(self, seconds: float | None) -> bool | None:
        """Whether a token at this price is cheaper than it is without windows."""
        others = (median(_now(self.apart)), self._together())
        return None if seconds is None else seconds < min(other for other in others if other is not None)

    def _together(self) -> float | None:
        apart, right, wrong = _now(self.apart), _now(self.right), _now(self.wrong)
        share = _share(self.drafts)
        if share is None or len(apart) < SAMPLES or len(right) + len(wrong) < SAMPLES:
            return None
        prepared = median(right or wrong)
        not_prepared = median(wrong) if wrong else prepared + median(apart) / 2
        return share * prepared + (1 - share) * not_prepared

    def _ahead(self) -> float | None:
        return _of_rounds(self.ahead, self.drafts, least=2)

    def _lookup(self) -> float | None:
        return _of_rounds(self.lookup, self.found, least=3)

    def _promises(self) -> bool:
        """Whether drafts are right so often that windows could pay: their scaling passes alone cost k + 1 halves."""
        share = _share(self.drafts)
        return share is not None and expected(share, AHEAD) > (AHEAD + 1) / 2


def _is_measured(seconds: float | None, drafts: int) -> bool:
    """Whether a round with these drafts has a price, or gets one: only full ones are measured."""
    return drafts == AHEAD or (drafts > 0 and seconds is not None)


def _now(values: Iterable[float]) -> list[float]:
    """A copy: threads share what was measured."""
    return list(values)


def _share(drafts: deque[bool]) -> float | None:
    known = list(drafts)
    return sum(known) / len(known) if len(known) >= SAMPLES else None


def _of_rounds(rounds: deque[float], drafts: deque[bool], least: int) -> float | None:
    """Seconds for a token, of rounds that read `AHEAD` drafts; None while too few rounds are known."""
    seconds, share = _now(rounds), _share(drafts)
    return None if len(seconds) < least or share is None else median(seconds) / expected(share, AHEAD)
