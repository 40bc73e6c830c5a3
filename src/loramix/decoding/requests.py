"""Which call of `generate` a thread is in, and which session decodes in its model's place."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from loramix.decoding.lockstep import Lockstep, LockstepReport, Wanted, as_wanted
from loramix.passes.two_pass import MixtureState


@dataclass
class Request:
    """One call of `generate`.

    Attributes:
        wanted: what its argument `lockstep` was.
        report: how it decodes; None where transformers takes a way of its own, such as beams.
        running: whether it is under way; not so for what stands in where no call is.
        finished: (B,), True for rows that it only pads any more; None where there is none so far.
        models: the states of the models whose calls are under way, each within the one before.
        drafts: whether its model is among those already: then it writes candidates for that call.
        scoring: whether its logits processors are at work: a forward of theirs reads other texts.
    """

    wanted: Wanted = None
    report: LockstepReport | None = None
    running: bool = False
    finished: Tensor | None = None
    models: tuple[MixtureState, ...] = ()
    drafts: bool = False
    scoring: bool = False


class WatchedProcessors(LogitsProcessorList):
    """The logits processors of a call, which tell it when they are at work.

    Args:
        processors: all of them.
        call: the call.
    """

    def __init__(self, processors: LogitsProcessorList, call: Request) -> None:
        super().__init__(processors)
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.call.scoring = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.call.scoring = False


class WatchedCriteria(StoppingCriteriaList):
    """The criteria of a call, which tell it which of its rows have finished.

    Args:
        criteria: all of them.
        call: the call.
    """

    def __init__(self, criteria: StoppingCriteriaList, call: Request) -> None:
        super().__init__(criteria)
        self.call = call
        self.pads = any(hasattr(one, "eos_token_id") for one in criteria)  # without an end, rows go on all the same
        self._done: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = super().__call__(*args, **kwargs)
        if self.pads:
            self.call.finished = self._done  # what a row finished with is still to be read
            self._done = done if self._done is None else self._done | done
        return done


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
def asked(wanted: Wanted, state: MixtureState) -> Generator[Request]:
    """Inside, in this thread, a model's `generate` runs, and was asked for lockstep or not."""
    outer = _current.request
    call = Request(wanted, running=True, models=(*outer.models, state), drafts=state in outer.models)
    _current.request = call
    try:
        yield call
    finally:
        call.running = False
        _current.request = outer


def request() -> Request:
    """The innermost call of `generate` in this thread."""
    return _current.request


def wanted_by(generation_config: Any, wanted: Wanted) -> Wanted:
    """What the call asked for, else what the generation's configuration says.

    Raises:
        ConfigurationError: nothing that it may say.
    """
    return as_wanted(getattr(generation_config, "lockstep", None)) if wanted is None else wanted


_told: set[str] = set()


def tell(reason: str, asked_for: str = "lockstep=True") -> None:
    """Say once why what was asked for did not happen."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"{asked_for}, but the two passes run one after the other: {reason}.", stacklevel=3)
