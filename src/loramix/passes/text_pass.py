"""One pass whose scalings are known before it begins, from the input embeddings of the text so far.

What the router makes of each token goes on from the token before, and so lies beside the base model's cache.

B, S: batch, sequence. T: tokens in the cache. H: hidden size. F: width of a summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from loramix.errors import CacheError, RoutingError
from loramix.experts.offload import with_weights
from loramix.layers.layer import XLoraLayer
from loramix.layers.slot import routed
from loramix.passes.cache import claim, follow, refuse_two_pass_cache, tokens_in
from loramix.passes.call import BackboneCall
from loramix.passes.hooks import CacheFollower, join_losses
from loramix.passes.state import MixtureState
from loramix.passes.two_pass import by_tokens, refuse_shared_state
from loramix.routers.linear import normalised
from loramix.routers.router import TextRouter


def text_pass(state: MixtureState, call: BackboneCall) -> Any:
    """A forward of a mixture whose router reads the input embeddings of the text so far.

    Raises:
        CacheError: a cache of two passes, or one that this mixture did not fill; any, if the base model keeps state
            elsewhere.
        RoutingError: no text, or a mask that does not tell which tokens are padding.
    """
    refuse_shared_state(state, call)
    refuse_two_pass_cache(call.cache)
    claim(call.cache, state.owner)
    router = state.router
    assert isinstance(router, TextRouter)
    whole = bool(state.uses.seeing_cached) or not getattr(call.cache, "is_compileable", False)
    summaries = None if call.cache is None else _summaries_in(call.cache, state.owner, whole=whole)
    embeddings = _embeddings(call)
    past = 0 if summaries is None else summaries.length if whole else tokens_in(cast(Cache, call.cache))
    real, first = real_and_first(call.arguments, embeddings.shape[:2], past)
    before = None if summaries is None else summaries.last
    embeddings, real, first = (each.to(_device_of(router, embeddings)) for each in (embeddings, real, first))
    read = with_weights(router, router.read, embeddings, real, first, before)
    made = state.route(read, call.hook_inputs, call.training)
    if summaries is not None:
        summaries.add(read.detach())
    cached = None
    if state.uses.seeing_cached:
        gating, every = state.gating, read if summaries is None else summaries.rows
        cached = gating.select(gating.activate(with_weights(router, router.distinct, every)))
    out = routed(by_tokens(state, call, made.routing, cached), call.run)
    join_losses(out, made.losses)
    new = None if call.cache is not None else out.get(call.signature.cache)
    claim(new, state.owner)
    if isinstance(new, Cache):
        followed = follow(new)
        followed.followers = (*followed.followers, Summaries(state.owner, read.detach()))
        for hook in state.hooks:
            hook.cached(followed)
    return call.returned(out)


class Summaries(CacheFollower):
    """The router's summary at each token of a cache.

    Args:
        owner: the mixture that filled the cache.
        rows: (B, T, F), the summaries; None while the cache is empty.
        whole: whether all are kept; else the last one alone, so that shapes stay as they are.
    """

    def __init__(self, owner: str, rows: Float[Tensor, "B T F"] | None = None, *, whole: bool = True) -> None:
        self.owner = owner
        self._rows = rows
        self._whole = whole

    @property
    def rows(self) -> Float[Tensor, "B T F"]:
        """Those of all tokens; asked for when there are some."""
        assert self._rows is not None
        return self._rows

    @property
    def length(self) -> int:
        """T; 1 if only the last one is kept."""
        return 0 if self._rows is None else self._rows.shape[1]

    @property
    def last(self) -> Float[Tensor, "B F"] | None:
        """That of the last token; None while the cache is empty."""
        return self._rows[:, -1] if self._rows is not None and self._rows.shape[1] else None

    def add(self, rows: Float[Tensor, "B S F"]) -> None:
        """So many tokens more."""
        if not self._whole:
            self._rows = rows[:, -1:].contiguous()
        else:
            self._rows = rows if not self.length else torch.cat([self.rows, rows], 1)

    def reordered(self, rows: Tensor) -> None:
        if self._rows is not None:
            self._rows = self._rows[rows.to(self._rows.device)]

    def repeated(self, times: int) -> None:
        if self._rows is not None:
            self._rows = self._rows.repeat_interleave(times, 0)

    def cropped(self, tokens: int) -> None:
        if self._rows is not None and tokens:
            if not self._whole:
                raise CacheError(
                    "A router of text goes back to an earlier token where it has kept what it knew there.",
                    received="a static cache that is cropped",
                    remedy="use a dynamic cache, or reset this one",
                )
            self._rows = self._rows[:, : self.length - tokens]

    def emptied(self) -> None:
        self._rows = None

    def holds(self, tokens: int | None) -> bool:
        """Whether these are the summaries of so many tokens; None: of an unknown number."""
        return tokens is None or not self._whole or tokens == self.length

    def __reduce__(self) -> tuple[Any, ...]:
        return _summaries, (self.owner, self._rows, self._whole)


def _summaries(owner: str, rows: Tensor | None, whole: bool) -> Summaries:
    return Summaries(owner, rows, whole=whole)


def _summaries_in(cache: Any, owner: str, *, whole: bool) -> Summaries:
    """The summaries of a cache's tokens; an empty cache gains them now.

    Raises:
        CacheError: no transformers `Cache`, one that this mixture did not fill, or one that holds other tokens.
    """
    if not isinstance(cache, Cache):
        raise CacheError(
            "What a router of text knows lies beside a cache of transformers' class Cache.",
            received=f"a {type(cache).__name__}",
            remedy="pass use_cache=False, or install a newer transformers: pip install -U transformers",
        )
    followed = follow(cache)
    own = next((each for each in followed.followers if isinstance(each, Summaries)), None)
    if own is None or own.owner != owner:
        if tokens_in(followed) > 0:
            raise _foreign("a cache that another model filled")
        others = tuple(each for each in followed.followers if each is not own)
        own = Summaries(owner, whole=whole)
        followed.followers = (*others, own)
    held = _held(followed)
    if not own.holds(held):
        raise _foreign(f"{held} tokens in the cache, {own.length} of which were routed")
    return own


def _foreign(received: str) -> CacheError:
    return CacheError(
        "A mixture whose router reads the text continues only a cache that it filled itself.",
        received=received,
        remedy="pass an empty cache, or one that this mixture returned",
    )


def _held(cache: Cache) -> int | None:
    """The number of tokens in a cache; None where it is not told without waiting for a device, or not at all."""
    if torch.compiler.is_compiling():
        return None
    try:
        found = cache.get_seq_length()
    except ValueError:  # a cache of states only, such as Mamba's
        return None if cache.has_previous_state() else 0
    return None if isinstance(found, Tensor) and found.device.type != "cpu" else int(found)


def embedding_of(model: Any) -> nn.Module:
    """The base model's own input embedding, without experts."""
    found = model.get_input_embeddings()
    return found.base_layer if isinstance(found, XLoraLayer) else found


def embedded(model: Any, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S H"]:
    """What a router of text reads of tokens: x / rms(x), x their embeddings."""
    return normalised(embedding_of(model)(ids).float())


def _embeddings(call: BackboneCall) -> Float[Tensor, "B S H"]:
    """What the router reads of the text that enters the backbone.

    Raises:
        RoutingError: no text.
    """
    given, ids = call.arguments.get("inputs_embeds"), call.arguments.get("input_ids")
    if isinstance(given, Tensor):
        return normalised(given.float())
    if not isinstance(ids, Tensor):
        raise RoutingError(
            "A router of text reads input_ids or inputs_embeds.",
            received=f"a forward of {type(call.model).__name__} without either",
            remedy='use router="static" or router="linear"',
        )
    return embedded(call.model, ids)


def _device_of(router: nn.Module, like: Tensor) -> torch.device:
    parameter = next(router.parameters())
    return like.device if parameter.is_meta else parameter.device


def real_and_first(
    arguments: Mapping[str, Any], tokens: torch.Size, past: int | Tensor
) -> tuple[Bool[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Which tokens are no padding, and which begin a further text in their row.

    Padding is told by a mask of tokens, or by one of pairs, in which nobody attends to padding; a further text by
    positions that begin again at 0, or by a mask of pairs, in which its first token does not attend to the one before.

    Raises:
        RoutingError: a mask that tells neither.
    """
    mask, positions, length = arguments.get("attention_mask"), arguments.get("position_ids"), tokens[1]
    if isinstance(mask, Mapping):  # one for each kind of attention: the widest tells
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    real, first = torch.ones(tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.bool)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < length:
            shape = f" of the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else ""
            raise RoutingError(
                "A router of text is told which tokens are padding.",
                received=f"attention_mask of the type {type(mask).__name__}{shape} for {length} tokens",
                remedy='pass a mask (B, S) of zeros and ones, or use attn_implementation="sdpa"',
            )
        last = mask.shape[-1] - length
        start = past.clamp(max=last).to(mask.device) if isinstance(past, Tensor) else min(past, last)
        columns = start + torch.arange(length, device=mask.device)
        if mask.dim() == 4:
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            seen = allowed.any(1).index_select(-1, columns)
            real = seen.any(-2).expand(tokens)
            follows = seen.diagonal(offset=-1, dim1=-2, dim2=-1)
            first = nn.functional.pad(~follows, (1, 0)).expand(tokens)
        else:
            real = mask.bool().index_select(-1, columns).expand(tokens)
    if isinstance(positions, Tensor) and positions.dim() in (2, 3):
        at_start = (positions if positions.dim() == 3 else positions.unsqueeze(0)) == 0
        first = first | at_start.all(0).expand(tokens).to(first.device)
    return real, first.to(real.device) & real
