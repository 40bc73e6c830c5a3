"""Which way of decoding is the cheaper one: measured while it runs, from the seconds that tokens took."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

SAMPLES = 4  # tokens before a way is judged
TRIAL = 6  # tokens for which lockstep is tried again
FIRST_WAIT, LONGEST_WAIT = 32, 1024  # tokens between trials


@dataclass
class Pace:
    """Seconds for a token each way, and how often drafts were right: what decides between the two.

    Attributes:
        apart: the last tokens with the passes one after the other.
        right: the last ones in lockstep that a right draft had prepared.
        wrong: the last ones in lockstep that cost a forward more.
        drafts: whether the last drafts were right.
        wait: tokens until lockstep is tried again, where it did not pay; doubled each time.
        waited: of them, those that have passed.
        trial: tokens that are left of a trial.
    """

    apart: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    right: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    wrong: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    drafts: deque[bool] = field(default_factory=lambda: deque(maxlen=24))
    wait: int = FIRST_WAIT
    waited: int = 0
    trial: int = 0

    def pays(self) -> bool | None:
        """Whether lockstep is the cheaper way; None while too little is known."""
        apart, right, wrong, drafts = map(list, (self.apart, self.right, self.wrong, self.drafts))  # threads share them
        if len(apart) < SAMPLES or len(right) + len(wrong) < SAMPLES or len(drafts) < SAMPLES:
            return None
        share = sum(drafts) / len(drafts)
        prepared = median(right or wrong)
        not_prepared = median(wrong) if wrong else prepared + median(apart) / 2
        return share * prepared + (1 - share) * not_prepared < median(apart)

    def choose(self) -> bool:
        """Whether the next token is decoded in lockstep.

        The first tokens measure both ways. Where lockstep does not pay it is tried again, but less and less often, so
        that trying costs little in the end; it may pay on other text.
        """
        if len(self.apart) < SAMPLES:
            return False
        pays = self.pays()
        if self.trial:
            self.trial -= 1
            if not self.trial and pays is False:
                self.wait, self.waited = min(2 * self.wait, LONGEST_WAIT), 0
            return True
        if pays is False:
            self.waited += 1
            if self.waited < self.wait:
                return False
            self.drafts.clear()
            self.trial = TRIAL - 1
        elif pays:
            self.wait = FIRST_WAIT
        return True
