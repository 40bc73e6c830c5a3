"""Two key-value caches in one object: the mixture pass's, and as its twin the scaling pass's.

A cache that a user passes in stays the user's object: it gains a twin, and its class becomes a run-time subclass that
applies every change of shape to the twin too. So it may be reused, cropped, reordered and deep-copied as any cache.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from loramix._compat import finish_reset
from loramix.errors import CacheError
from loramix.passes.hooks import CacheFollower


class FollowedCache(Cache):
    """A cache that tells its followers how its rows change; a single-pass cache becomes one when it is followed.

    Not built by hand: `follow` turns a cache into one.

    Attributes:
        followers: those that are told how its rows change.
    """

    followers: tuple[CacheFollower, ...] = ()

    def reset(self) -> None:
        super().reset()
        finish_reset(self)
        for follower in self.followers:
            follower.emptied()

    def crop(self, tokens_to_remove: int) -> None:
        """As in the base class: a negative number of tokens to remove; before transformers 5.14 also a length."""
        before = tokens_in(self)
        super().crop(tokens_to_remove)
        for follower in self.followers:
            follower.cropped(int(before - tokens_in(self)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        for follower in self.followers:
            follower.reordered(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for follower in self.followers:
            follower.repeated(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for follower in self.followers:
            follower.reordered(indices)

    def __reduce__(self) -> tuple[Any, ...]:
        own, kind = type(self).__bases__
        return _rebuild, (own, kind), self.__dict__


def follow(cache: Cache) -> FollowedCache:
    """`cache` itself, made a `FollowedCache`."""
    if not isinstance(cache, FollowedCache):
        cache.__class__ = _subclass(FollowedCache, type(cache))
    assert isinstance(cache, FollowedCache)
    return cache


class TwoPassCache(FollowedCache):
    """A cache of the mixture pass that carries the scaling pass's cache along.

    Not built by hand: `TwoPassCache.pair` turns a cache into one, and a mixture does so by itself.

    Attributes:
        base: the scaling pass's cache, of the same kind.
        owner: the mixture that filled it; another one refuses it.
        torn: whether a forward is filling it, or was interrupted while filling it.
        scalings: (B, T, L, E), the final scalings of its tokens, where a layer sees cached tokens; elsewhere None.
    """

    base: Cache
    owner: str
    torn: bool
    scalings: Tensor | None

    @staticmethod
    def pair(mixture: Any, base: Any, owner: str) -> TwoPassCache:
        """Make `mixture` a two-pass cache, in place, with `base` as its twin.

        Raises:
            CacheError: it is not a transformers `Cache`; Mamba's was none before transformers 5.5.
        """
        _check_kind(mixture)
        mixture.__class__ = _subclass(TwoPassCache, type(mixture))
        mixture.__dict__.update(base=base, owner=owner, torn=False, scalings=None)
        return mixture

    @staticmethod
    def adopt(cache: Any, owner: str) -> TwoPassCache:
        """`cache` itself as this mixture's two-pass cache; an empty one gains its twin now.

        Raises:
            CacheError: it was filled by another model, its two halves differ in length, or it is of another kind.
        """
        _check_kind(cache)
        if isinstance(cache, TwoPassCache) and cache.owner != owner and cache.is_empty:
            cache.owner, cache.scalings = owner, None
        if not isinstance(cache, TwoPassCache):
            if tokens_in(cache) > 0:
                raise _foreign("a cache that a model without these experts filled")
            return TwoPassCache.pair(cache, _empty_copy(cache), owner)
        if cache.owner != owner:
            raise _foreign("a cache that another mixture filled")
        if cache.torn or _lengths_differ(cache):
            mixture, base = tokens_in(cache), tokens_in(cache.base)
            raise CacheError(
                "Both halves of a two-pass cache hold the same tokens.",
                received="a cache that an interrupted forward left half filled"
                if cache.torn
                else f"{int(mixture)} tokens of the mixture pass, {int(base)} of the scaling pass",
                remedy="reset() it or pass an empty one, and change it through its own methods, not through its layers",
            )
        return cache

    @property
    def is_empty(self) -> bool:
        """Whether neither half holds a token, as after `reset`."""
        return not self.torn and not tokens_in(self) and not tokens_in(self.base)

    @property
    def mixture(self) -> Cache:
        """The mixture pass's cache: this object."""
        return self

    def separate(self) -> None:
        """Become the user's plain cache again, without a twin."""
        self.__class__ = type(self).__bases__[1]
        for name in ("base", "owner", "torn", "scalings"):
            del self.__dict__[name]
        self.__dict__.pop("followers", None)

    def reset(self) -> None:
        super().reset()
        self.base.reset()
        finish_reset(self.base)
        self.torn, self.scalings = False, None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.base.crop(tokens_to_remove)
        if self.scalings is not None:
            self.scalings = self.scalings[:, : int(tokens_in(self))]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.base.reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        if self.scalings is not None:
            self.scalings = self.scalings.index_select(0, beam_idx.to(self.scalings.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.base.batch_repeat_interleave(repeats)
        if self.scalings is not None:
            self.scalings = self.scalings.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.base.batch_select_indices(indices)
        if self.scalings is not None:
            self.scalings = self.scalings[indices.to(self.scalings.device)]

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.base.activate_past_recording()


def _empty_copy(cache: Cache) -> Cache:
    """Another empty cache of the same kind; an offloading one shares its stream, which cannot be copied."""
    stream = getattr(cache, "prefetch_stream", None)
    return copy.deepcopy(cache, {} if stream is None else {id(stream): stream})


def _lengths_differ(cache: TwoPassCache) -> bool:
    """Whether the halves hold different numbers of tokens; not checked where that would synchronise with a device."""
    if torch.compiler.is_compiling():
        return False
    mixture, base = tokens_in(cache), tokens_in(cache.base)
    scaled = mixture if cache.scalings is None else cache.scalings.shape[1]
    waits = isinstance(mixture, Tensor) and mixture.device.type != "cpu"
    return not waits and bool(mixture != base or mixture != scaled)


def tokens_in(cache: Cache) -> int | Tensor:
    """The number of tokens in a cache; 1 for any number in a cache of states only, such as Mamba's."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


def _check_kind(cache: object) -> None:
    if not isinstance(cache, Cache):
        raise CacheError(
            "A mixture's two passes share one cache object, of transformers' class Cache.",
            received=f"a {type(cache).__name__}",
            remedy="pass use_cache=False, or install a newer transformers: pip install -U transformers",
        )


def _foreign(received: str) -> CacheError:
    return CacheError(
        "A mixture continues only a cache that it filled itself.",
        received=received,
        remedy="pass an empty cache, or one that this mixture returned",
    )


def refuse_two_pass_cache(cache: Any) -> None:
    """Refuse a cache of two passes where only one pass runs; an empty one becomes plain.

    Raises:
        CacheError: it holds tokens.
    """
    if isinstance(cache, TwoPassCache) and cache.is_empty:
        cache.separate()
    if isinstance(cache, TwoPassCache):
        raise CacheError(
            "A cache is continued the way it was filled.",
            received="a cache of the mixture's two passes, with adapters disabled or scalings fixed",
            remedy="pass an empty cache to the model inside the context manager",
        )


def claim(cache: Any, owner: str) -> None:
    """Note which mixture fills a cache of one pass, and refuse one that another mixture has filled.

    A cache that a single pass has filled, of the base model or with fixed scalings, may be continued.

    Raises:
        CacheError: another mixture filled it.
    """
    if torch.compiler.is_compiling() or not isinstance(cache, Cache):
        return
    known = vars(cache).get(_FILLED_BY)
    if known == owner:
        return
    if known is not None and tokens_in(cache) > 0:
        raise _foreign("a cache that another mixture filled")
    vars(cache)[_FILLED_BY] = owner


_FILLED_BY = "_loramix_owner"


@functools.cache
def _subclass(own: type[FollowedCache], kind: type[Cache]) -> type[FollowedCache]:
    """The run-time subclass of a cache's class, with the same names."""
    if issubclass(kind, own):
        return kind
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (own, kind), names)


def _rebuild(own: type[FollowedCache], kind: type[Cache]) -> FollowedCache:
    made = _subclass(own, kind)
    return made.__new__(made)
