"""The thread-local slot through which a pass hands its routing to the adapted layers.

A pass fills the slot for as long as it runs (`routed`). Under gradient checkpointing a block runs again in backward,
at another time and maybe in another thread; `checkpoint_with` fills the slot again for that. Hooks, arguments of the
blocks and attributes of the layers take no part, so two threads, two forwards before one backward, and blocks that
take no extra arguments all work (docs/architecture.md, decision 3).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loramix.errors import RoutingError
from loramix.layers.routing import Routing


class ObservedPass:
    """One pass with a given routing, whose last hidden states are kept.

    Args:
        routing: what the layers read.

    Attributes:
        hidden: the backbone's last hidden states (B, S, H), once the pass has run.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.hidden: Tensor | None = None


Override = Callable[[], Routing | ObservedPass]
"""Gives the one pass that a model is to make instead of routing."""


class HeadCall:
    """One forward of a model whose head is adapted: the head runs after the passes, in none of them.

    Args:
        kept: which tokens go on to the head: the last ones, all if 0, or their numbers.

    Attributes:
        routing: that of the last pass, once there was one.
    """

    def __init__(self, kept: int | Tensor) -> None:
        self.kept = kept
        self.routing: Routing | None = None
        self._is_called = False

    def take(self) -> Routing | None:
        """The routing of the tokens that go on to the head."""
        self._is_called = True
        return None if self.routing is None else self.routing.of_tokens(self.kept)

    @property
    def is_bypassed(self) -> bool:
        """Whether experts were to act, and the head was not called."""
        return self.routing is not None and not self.routing.silent and not self._is_called


class _Slot(threading.local):
    def __init__(self) -> None:  # set here, not on the class: compiled code guards on the instance's own dictionary
        self.routing: Routing | None = None
        self.bypassed: dict[int, object] = {}
        self.overrides: tuple[tuple[object, Override], ...] = ()
        self.head: HeadCall | None = None


_slot = _Slot()


def is_running() -> bool:
    """Whether a pass is running in this thread."""
    return _slot.routing is not None


def current() -> Routing:
    """The routing in force.

    Raises:
        RoutingError: no pass is under way in this thread.
    """
    routing = _slot.routing
    if routing is None and _slot.head is not None:
        routing = _slot.head.take()
    if routing is None:
        raise RoutingError(
            "An adapted layer runs only inside the passes of its model.",
            received="a call of the layer, or of a block around it, on its own",
            remedy="call the model or its backbone; they run the passes and hand the scalings to the layers",
        )
    return routing


def routed(routing: Routing, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call with `routing` in force for this thread, and restore what was in force before; the head reads it then."""
    outer, _slot.routing = _slot.routing, routing
    try:
        return call(*args, **kwargs)
    finally:
        _slot.routing = outer
        if _slot.head is not None:
            _slot.head.routing = routing


@contextmanager
def head_call(kept: int | Tensor) -> Generator[HeadCall]:
    """Inside, in this thread, one forward of a model whose head is adapted."""
    outer, _slot.head = _slot.head, HeadCall(kept)
    try:
        yield _slot.head
    finally:
        _slot.head = outer


def weight_read(layer: object) -> None:
    """Note that the base model reads the weight of an adapted layer while a pass runs."""
    if _slot.routing is not None and not _slot.routing.silent and not torch.compiler.is_compiling():
        _slot.bypassed[id(layer)] = layer


def called(layer: object) -> None:
    """Note that an adapted layer is called; then it does not matter that its weight is read too."""
    if _slot.bypassed:
        _slot.bypassed.pop(id(layer), None)


def take_bypassed() -> list[Any]:
    """The adapted layers whose weight was read in this thread since the last call, and that were not called then."""
    if not _slot.bypassed:
        return []
    found, _slot.bypassed = list(_slot.bypassed.values()), {}
    return found


@contextmanager
def override(owner: object, make: Override) -> Generator[None]:
    """Inside, in this thread, the model that owns `owner` makes one pass, with the routing that `make()` returns.

    Nests: the innermost is in force. Like `torch.no_grad`, it does not reach into other threads.
    """
    outer = _slot.overrides
    _slot.overrides = (*outer, (owner, make))
    try:
        yield
    finally:
        _slot.overrides = outer


def overriding(owner: object) -> Override | None:
    """The innermost override of `owner` in this thread."""
    for other, make in reversed(_slot.overrides):
        if other is owner:
            return make
    return None


def checkpoint_with(checkpoint: Callable[..., Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `call` so that its recomputation reads the routing and the overrides that are in force now."""
    return checkpoint(functools.partial(_replay, call, _slot.routing, _slot.overrides), *args, **kwargs)


def _replay(
    call: Callable[..., Any],
    routing: Routing | None,
    overrides: tuple[tuple[object, Override], ...],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if _slot.overrides is not overrides:  # layers that read no routing of a pass ask for them
        outer, _slot.overrides = _slot.overrides, overrides
        try:
            return _replay(call, routing, overrides, *args, **kwargs)
        finally:
            _slot.overrides = outer
    if routing is None or _slot.routing is routing:
        return call(*args, **kwargs)
    return routed(routing, call, *args, **kwargs)
