"""The call of `generate` that a thread is in, and the session that decodes in place of its model."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from loramix.decoding.choice import AUTOMATIC, Choice
from loramix.decoding.report import LockstepReport
from loramix.decoding.session import Session
from loramix.passes.state import MixtureState


@dataclass
class Request:
    """One call of `generate`.

    Attributes:
        choice: how to decode.
        report: its counts; None if transformers decodes otherwise, as in beam search.
        running: whether it is running; False for the placeholder outside all calls.
        finished: (B,), True for rows that have ended and are only padded from now on; None before the first token.
        models: the states of the models whose calls are running, the outermost first.
        drafts: whether its model is also that of an outer call: then it drafts for that call, as an assistant.
        scoring: whether its logits processors are running: their forwards read other texts.
        cache: the cache that the user passed in, and may read afterwards.
    """

    choice: Choice = AUTOMATIC
    report: LockstepReport | None = None
    running: bool = False
    finished: Tensor | None = None
    models: tuple[MixtureState, ...] = ()
    drafts: bool = False
    scoring: bool = False
    cache: object = None


class RequestProcessors(LogitsProcessorList):
    """The logits processors of a call, which set its `scoring` while they run.

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


class RequestCriteria(StoppingCriteriaList):
    """The stopping criteria of a call, which set its `finished`.

    Args:
        criteria: all of them.
        call: the call.
    """

    def __init__(self, criteria: StoppingCriteriaList, call: Request) -> None:
        super().__init__(criteria)
        self.call = call
        self.pads = any(hasattr(one, "eos_token_id") for one in criteria)  # otherwise finished rows are not padded
        self._done: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = super().__call__(*args, **kwargs)
        if self.pads:
            self.call.finished = self._done  # a step later: the token that ends a row is still to be read
            self._done = done if self._done is None else self._done | done
        return done


class _Current(threading.local):
    def __init__(self) -> None:
        self.session: Session | None = None
        self.request = Request()


_current = _Current()


def session_of(mixture: MixtureState) -> Session | None:
    """The session of this thread that decodes a model."""
    session = _current.session
    return session if session is not None and session.mixture is mixture else None


@contextmanager
def decoding(session: Session) -> Generator[None]:
    """Inside, in this thread, the session computes single tokens in place of its model."""
    outer, _current.session = _current.session, session
    try:
        yield
    finally:
        _current.session = outer
        session.end()


@contextmanager
def no_session() -> Generator[None]:
    """Inside, in this thread, no session decodes in place of a model."""
    outer, _current.session = _current.session, None
    try:
        yield
    finally:
        _current.session = outer


@contextmanager
def new_request(choice: Choice, mixture: MixtureState, cache: object = None) -> Generator[Request]:
    """Inside, in this thread, a model's `generate` runs."""
    outer = _current.request
    models = (*outer.models, mixture)
    call = Request(choice, running=True, models=models, drafts=mixture in outer.models, cache=cache)
    _current.request = call
    try:
        yield call
    finally:
        call.running = False
        _current.request = outer


def request() -> Request:
    """The innermost call of `generate` in this thread."""
    return _current.request
