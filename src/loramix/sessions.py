"""Which call of `generate` a thread is in, and which session decodes in its model's place."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loramix.lockstep import Lockstep, LockstepReport, Wanted, as_wanted
from loramix.passes import MixtureState


@dataclass
class Request:
    """One call of `generate`.

    Attributes:
        wanted: what its argument `lockstep` was.
        report: how it decodes; None where transformers takes a way of its own, such as beams.
        running: whether it is under way; not so for what stands in where no call is.
        prompt: tokens of each row that it was given; those after them it makes, and pads rows that have finished.
        padding: the token that it pads with; None where no row can finish before the others.
        ends: tokens after which a row has finished.
    """

    wanted: Wanted = None
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
def asked(wanted: Wanted) -> Generator[Request]:
    """Inside, in this thread, `generate` runs, and was asked for lockstep or not."""
    outer, _current.request = _current.request, Request(wanted, running=True)
    try:
        yield _current.request
    finally:
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
