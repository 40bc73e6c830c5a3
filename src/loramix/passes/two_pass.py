"""Two passes: a scaling pass without gradients, then the mixture pass, each with a cache of its own.

B, S: batch, sequence. H: hidden size. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.errors import CacheError, RoutingError
from loramix.layers.routing import Routing, RoutingByStream, RoutingByTokens, TensorRouting, kept_tokens
from loramix.layers.slot import routed
from loramix.passes.cache import TwoPassCache
from loramix.passes.call import KEEP, BackboneCall, as_tokens
from loramix.passes.encoder_decoder import STATES, Encoded, leave, taken
from loramix.passes.hooks import join_losses
from loramix.passes.state import MixtureState


class ScalingPass(NamedTuple):
    """The result of a scaling pass.

    Attributes:
        hidden: the last hidden states (B, S, H), after the final norm.
        cache: the cache that the pass made; None where it made none, was given one, or did not run.
    """

    hidden: Tensor
    cache: Any


def two_passes(state: MixtureState, call: BackboneCall) -> Any:
    """A forward of a mixture whose router reads hidden states.

    Raises:
        RoutingError: a layer that sees other tokens than the scalings were made for; a decoder that reads other states
            than its encoder's.
        CacheError: a cache that this mixture did not fill; any, if the base model keeps state elsewhere.
    """
    refuse_shared_state(state, call)
    encoded = taken(call, state.owner) if call.role == "decoder" else None
    cache = None if call.cache is None else TwoPassCache.adopt(call.cache, state.owner)
    if cache is None:
        _keep_no_cache_in_training(call)
    else:
        cache.torn = True
    first = _scaling_pass(state, call, cache, encoded)
    second = state.route(first.hidden, call.hook_inputs, call.training, call.role == "encoder")
    cached = _cached_scalings(state, cache, second.routing.scalings)
    routing = by_tokens(state, call, second.routing, cached)
    if encoded is not None:
        routing = RoutingByStream(routing, state.routing(encoded.scalings), state.uses.seeing_encoder)
    out = routed(routing, call.run)
    join_losses(out, second.losses)
    if call.role == "encoder":
        leave(out, first.hidden, second.routing.scalings, state.owner)
    pair = cache
    if cache is not None:
        cache.torn = False
    elif first.cache is not None and out.get(call.signature.cache) is not None:
        pair = TwoPassCache.pair(out[call.signature.cache], first.cache, state.owner)
        for hook in state.hooks:
            hook.cached(pair)
    if pair is not None and cached is not None:
        pair.scalings = cached.detach()
    return call.returned(out)


def refuse_shared_state(state: MixtureState, call: BackboneCall) -> None:
    """Use no cache where the base model keeps state outside it: two passes would share it, and it has no followers."""
    kept = state.uses.kept
    if not kept.is_any or call.role == "encoder":
        return
    asked = [f"{name}=…" for name in (call.signature.cache, *kept.fields) if call.arguments.get(name) is not None]
    if not asked and call.arguments.get("use_cache") is not True:
        call.arguments["use_cache"] = False
        return
    what = asked[0] if asked else "use_cache=True"
    where = "its modules" if kept.in_modules else ", ".join(kept.fields)
    raise CacheError(
        "A mixture goes on from a cache where the base model keeps nothing elsewhere.",
        received=f"{what} for a {type(call.model).__name__}, which keeps state in {where}",
        remedy="pass use_cache=False and the whole text; generate does so by itself",
    )


def _keep_no_cache_in_training(call: BackboneCall) -> None:
    """The cache of a training step is never continued."""
    asked = call.role == "encoder" or call.arguments.get("use_cache") is True
    if call.training and torch.is_grad_enabled() and not asked:
        call.arguments["use_cache"] = False


def _cached_scalings(
    state: MixtureState, cache: TwoPassCache | None, scalings: Float[Tensor, "B S #L E"]
) -> Float[Tensor, "B T #L E"] | None:
    """Those of all tokens of the text, for layers that see these; None where there are no such layers."""
    if not state.uses.seeing_cached:
        return None
    past = None if cache is None else cache.scalings
    return scalings if past is None or not past.shape[1] else torch.cat([past, scalings], 1)


def by_tokens(state: MixtureState, call: BackboneCall, routing: TensorRouting, cached: Tensor | None) -> Routing:
    """The routing of the mixture pass, in which some layers see other tokens: those kept for the head, or cached.

    Raises:
        RoutingError: as many tokens are kept as there are, in another order.
    """
    every = routing.scalings
    kept = None if call.keeps is None else kept_tokens(every, call.keeps)
    if kept is not None and kept.shape == every.shape:
        _refuse_other_order(kept, every, call.keeps)
        kept = None
    if kept is None and cached is None:
        return routing
    return RoutingByTokens(state.routing, routing, kept, cached, state.uses.seeing_cached)


def _refuse_other_order(kept: Tensor, every: Tensor, keep: Any) -> None:
    if isinstance(keep, Tensor) and not torch.equal(kept, every):
        raise RoutingError(
            "Tokens that are kept for the head are fewer than those of the text, or in their order.",
            received=f"{KEEP}=… with an index of {tuple(keep.shape)} for tokens {tuple(every.shape[:2])}",
            remedy="sort the index, or keep all tokens and choose among the logits",
        )


def _scaling_pass(
    state: MixtureState, call: BackboneCall, cache: TwoPassCache | None, encoded: Encoded | None
) -> ScalingPass:
    """The backbone's last hidden states with every expert at `scaling_pass_value`, recalled by a hook if possible."""
    arguments = call.arguments | call.signature.quiet
    if encoded is not None:
        # The router's gradient needs them as they are; Moonshine's decoder writes into what it is given.
        arguments[STATES] = encoded.hidden.clone() if torch.is_grad_enabled() else encoded.hidden
    if call.keeps is not None:
        arguments[KEEP] = 0  # the scalings of every token are needed
    if cache is not None:
        arguments[call.signature.cache] = cache.base
    # a training step: its texts occur again; those of a decoder are not all that it reads
    repeats = cache is None and encoded is None and arguments.get("use_cache") is False
    hidden = state.recall(arguments) if repeats else None
    if hidden is not None:
        return ScalingPass(hidden, None)
    with torch.no_grad():
        out = routed(state.scaling_pass(), call.forward, call.model, **arguments)
    hidden = as_tokens(out.last_hidden_state)
    if repeats:
        state.keep(arguments, hidden)
    return ScalingPass(hidden, out.get(call.signature.cache))
