"""The head of a model, where experts adapt it: it runs after the backbone, and reads the routing of its last pass.

    the model's forward     opens a call of the head             `routes_head`
    the backbone's passes   each leaves its routing; the mixture pass is the last          `layers/slot.py`
    the adapted head        reads the routing of the tokens that `logits_to_keep` keeps    `layers/slot.py`

So the backbone and the head can only be run together, by the model that has both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from loramix.errors import RoutingError
from loramix.layers.slot import head_call
from loramix.passes.call import KEEP
from loramix.passes.state import AdaptedState


def routes_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model whose head may be adapted.

    Raises (the result):
        RoutingError: a forward that ran the backbone, and computed its logits without calling the adapted head.
    """
    names = tuple(inspect.signature(forward).parameters)[1:]
    position = names.index(KEEP) if KEEP in names else len(names)

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: AdaptedState = self._loramix
        if state.head is None:
            return forward(self, *args, **kwargs)
        with head_call(args[position] if position < len(args) else kwargs.get(KEEP, 0)) as call:
            out = forward(self, *args, **kwargs)
        if call.is_bypassed:
            raise RoutingError(
                "Experts act in a head that the base model calls.",
                received=f"a forward that did not call {state.head!r}",
                remedy="train the experts without it in target_modules; fused losses, such as Liger's, read the head's "
                "weight instead of calling it: turn them off",
            )
        return out

    return run
