"""One pass: a layer router makes the scalings inside the layers, and the base model's own cache is the only one.

B, S: batch, sequence. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from loramix.errors import RoutingError
from loramix.experts.layer_use import TokenOrder
from loramix.experts.offload import with_weights
from loramix.layers.routing import LayerRouting
from loramix.layers.slot import routed
from loramix.passes.cache import claim, follow, refuse_two_pass_cache
from loramix.passes.call import KEEP, BackboneCall, as_tokens
from loramix.passes.hooks import join_losses
from loramix.passes.state import MixtureState
from loramix.routers.router import ConstantRouter, LayerRouter


def one_pass(state: MixtureState, call: BackboneCall) -> Any:
    """A forward of a mixture whose router reads a layer's low-rank activation, or nothing.

    Raises:
        CacheError: a cache of two passes, or one that another mixture filled.
    """
    refuse_two_pass_cache(call.cache)
    claim(call.cache, state.owner)
    state.check_settings()
    if state.hooks and isinstance(call.cache, Cache):
        follow(call.cache)
    router = state.router
    assert isinstance(router, LayerRouter)
    if isinstance(router, ConstantRouter):
        logits = state.changed_logits(with_weights(router, router.constant_logits), call.training)
        routing = state.routing(state.gating.select(state.gating.activate(logits)))
        out = routed(routing, call.run)
        logits = logits.expand(*call.tokens(out), *logits.shape)
    else:
        if call.keeps is not None:
            call.arguments[KEEP] = 0  # the scalings of every layer and token are made known
        others = state.uses.seeing_encoder if call.role == "decoder" else ()
        layers = _LayerScalings(state, router, call.training, others)
        out = routed(LayerRouting(layers.of, state.config.global_scaling_weight), call.run)
        logits = layers.logits(as_tokens(out.last_hidden_state).shape[:2])
    output = state.gated(logits, call.hook_inputs, call.training, call.role == "encoder")
    join_losses(out, state.publish(output))
    made = None if call.cache is not None else out.get(call.signature.cache)
    claim(made, state.owner)
    if state.hooks and made is not None:
        for hook in state.hooks:
            hook.cached(follow(made))
    return call.returned(out)


class _LayerScalings:
    """The scalings of one forward, layer by layer, and their logits.

    Args:
        state: the mixture's.
        router: its router.
        training: whether the model is in training mode.
        others: the numbers of the layers that see other tokens, an encoder's.
    """

    def __init__(self, state: MixtureState, router: LayerRouter, training: bool, others: Collection[int]) -> None:
        self._state, self._training, self._others = state, training, others
        self._gating = state.gating
        self._layer_logits = with_weights(router, router.for_pass)
        self._logits: dict[int, Tensor] | None = {}

    def of(self, layer: int, low_rank: Tensor) -> Tensor:
        """(*tokens, E), from (*tokens, R). A block that is recomputed calls it again."""
        logits = self._made(layer, low_rank)
        if self._state.hooks:
            logits = self._state.changed_logits(logits.unsqueeze(-2), self._training).squeeze(-2)
        if self._logits is not None:
            self._logits[layer] = logits
        return self._gating.select(self._gating.activate(logits))

    def _made(self, layer: int, low_rank: Tensor) -> Tensor:
        device = low_rank.device.type
        if not torch.is_autocast_enabled(device):
            return self._layer_logits(layer, low_rank.float())
        with torch.autocast(device, enabled=False):
            return self._layer_logits(layer, low_rank.float())

    def logits(self, tokens: torch.Size) -> Tensor:
        """(B, S, L, E), of all layers; NaN for a layer that did not run, or that saw other tokens.

        Raises:
            RoutingError: no layer ran.
        """
        made, self._logits = self._logits or {}, None
        made = {layer: logits.unsqueeze(-2) for layer, logits in made.items()}
        if not made:
            raise RoutingError(
                "An adapted layer is called in the forward of its model.",
                received=f"a forward in which none of {', '.join(self._state.paths)} was called",
                remedy="adapt layers that the base model calls, not layers whose weight it reads",
            )
        missing = next(iter(made.values())).new_full((*tokens, 1, len(self._state.names)), float("nan"))
        layers = range(len(self._state.paths))
        for layer in made.keys() & set(self._others):
            del made[layer]
        for layer in made.keys() & self._state.uses.seeing_cached:
            made[layer] = made[layer][..., -tokens[1] :, :, :]  # its tokens before these are the cache's
        orders = self._state.uses.orders
        return torch.cat([by_text(made.get(n), tokens, missing, orders.get(n, TokenOrder())) for n in layers], dim=-2)


def by_text(logits: Tensor | None, tokens: torch.Size, missing: Tensor, order: TokenOrder) -> Tensor:
    """A layer's logits by (B, S), from a layer that may hold them in another order, or flattened."""
    if logits is None or (logits.shape[:-2].numel() != tokens.numel() and not order.padded):
        return missing
    return order.by_text(logits, tokens[0])[:, : tokens[1]]
