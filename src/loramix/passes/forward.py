"""The carrier's forward: which passes a call makes, and in what order (docs/semantics.md §2).

The passes run in the carrier, the nearest `PreTrainedModel` above the adapted layers, so that a caller that runs
backbone and head separately gets the mixture too (docs/architecture.md, decision 2).

    disabled, fixed, overridden, one plain expert   one pass, with a routing that is given      `single_pass`
    a router that reads hidden states               a scaling pass, then the mixture pass       `two_passes`
    a router that reads the text                    one pass, the scalings made before it       `text_pass`
    a router that reads a layer's activation        one pass, the scalings made in the layers   `one_pass`

An encoder and a decoder each run their own; `encoder_decoder` is what the one hands to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from loramix.errors import RoutingError
from loramix.layers.routing import Routing
from loramix.layers.slot import ObservedPass, routed, take_bypassed
from loramix.passes.cache import refuse_two_pass_cache
from loramix.passes.call import BackboneCall, ForwardSignature, Role
from loramix.passes.hooks import EXPERT_IDS, given_expert_ids
from loramix.passes.one_pass import one_pass
from loramix.passes.state import AdaptedState, MixtureState
from loramix.passes.text_pass import text_pass
from loramix.passes.two_pass import two_passes


def mixture_forward(forward: Callable[..., Any], role: Role) -> Callable[..., Any]:
    """The forward of a backbone with experts in it.

    Args:
        forward: that of its class.
        role: whether it is the only backbone, an encoder or a decoder.

    Raises (the result):
        CacheError: a cache that this mixture did not fill.
        RoutingError: a layer that sees other tokens than the scalings were made for, or whose weight is read instead.
    """
    signature = ForwardSignature.of(forward)

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: AdaptedState = self._loramix
        arguments = signature.by_name(args, kwargs)
        expert_ids = arguments.pop(EXPERT_IDS, given_expert_ids())
        given = state.single_pass()
        if given is None and isinstance(state, MixtureState):
            call = BackboneCall(self, role, forward, signature, arguments, expert_ids)
            passes = two_passes if state.needs_scaling_pass else text_pass if state.reads_text else one_pass
            out = passes(state, call)
        else:
            assert given is not None
            refuse_two_pass_cache(arguments.get(signature.cache))
            out = single_pass(given, functools.partial(forward, self, **arguments))
        _refuse_bypassed(state)
        return out

    return run


def _refuse_bypassed(state: AdaptedState) -> None:
    paths = [state.paths[layer.stack.number] for layer in take_bypassed()]
    if paths:
        raise RoutingError(
            "Experts act in a layer that the base model calls.",
            received=f"a forward that read the weight of {', '.join(map(repr, paths[:3]))} without calling the layer "
            f"({len(paths)} such layers)",
            remedy="train the experts without them in target_modules; fused kernels, such as those of Mamba 2 in "
            "training on a GPU, read weights like this",
        )


def single_pass(given: Routing | ObservedPass, call: Callable[[], Any]) -> Any:
    """One pass with a given routing; an `ObservedPass` keeps the last hidden states."""
    if not isinstance(given, ObservedPass):
        return routed(given, call)
    out = routed(given.routing, call)
    given.hidden = out.last_hidden_state
    return out
