"""What a dry run shows of one layer: whose tokens it sees, and in which order.

Whose they are is told by their number. Their order is told by a token that is marked: a layer must see the mark where
the last hidden states show it, since the scalings are made of these.

B, S: batch, sequence.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TEXTS, TOKENS, OTHERS = 3, 7, 11
"""B, S, and the tokens of another stream: of an encoder, or of images."""

Sees = Literal["tokens", "cached tokens", "encoder tokens", "other tokens", "nothing"]


class TokenOrder(NamedTuple):
    """How a layer's input holds the tokens of the backbone.

    Attributes:
        tokens_first: the first dimension counts tokens, the second texts.
        padded: each text may be followed by padding, up to a multiple of a block's length.
    """

    tokens_first: bool = False
    padded: bool = False

    def fit(self, values: Tensor, tokens: torch.Size) -> Tensor:
        """Values for each token, in the layer's order; for padding they are 0.

        Args:
            values: (B, S, n), or (n,), which fit any tokens.
            tokens: the sizes of the layer's input without its features, of as many texts.
        """
        if values.dim() == 1:
            return values
        padding = tokens.numel() // len(values) - values.shape[1]
        if self.padded and padding > 0:
            values = F.pad(values, (0, 0, 0, padding))
        if self.tokens_first:
            values = values.transpose(0, 1)
        return values.flatten(0, 1) if len(tokens) == 1 else values

    def by_text(self, values: Tensor, texts: int) -> Tensor:
        """The reverse: values (*tokens, L, E) in the layer's order as (B, n, L, E), with those of padding.

        Args:
            values: for each token.
            texts: B.
        """
        rest = values.shape[-2:]
        if self.tokens_first:
            return values.reshape(-1, texts, *rest).transpose(0, 1)
        return values.reshape(texts, -1, *rest)

    def sizes(self, texts: int, length: int) -> tuple[tuple[int, ...], ...]:
        """The sizes that texts of this length can have in this order: as they are, or flattened."""
        return ((length, texts) if self.tokens_first else (texts, length), (texts * length,))


_TEXTS_FIRST, _TOKENS_FIRST = TokenOrder(), TokenOrder(tokens_first=True)


@dataclass
class LayerUse:
    """What the dry run showed of one layer.

    Attributes:
        sees: the backbone's tokens, in every call; with a cache, those that are in it too, as in multi-head latent
            attention; those of the encoder whose states the backbone was given; other ones in some call; or nothing,
            where it was not called.
        order: how its input holds them.
        texts: B and S.
        tokens: the sizes of what it sees, without the features, call by call.
        continued: the same of the next token, with a cache.
        longer: the same of texts that are one token longer.
        prints: a number for each token of the input, call by call.
        marked: the same of the same text with a marked token.
        weight_read: whether its weight was read from outside.
        returns_tuple: whether it returned more than a tensor.
        outside: whether it was called outside the forward of the backbone, by the model around it.
    """

    sees: Sees = "nothing"
    order: TokenOrder = _TEXTS_FIRST
    texts: tuple[int, int] = (TEXTS, TOKENS)
    tokens: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    continued: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    longer: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    prints: list[Tensor] = field(default_factory=list[Tensor])
    marked: list[Tensor] = field(default_factory=list[Tensor])
    weight_read: bool = False
    returns_tuple: bool = False
    outside: bool = False

    def clear(self) -> None:
        """Forget what a forward that failed has shown."""
        self.__dict__.update(vars(LayerUse()))

    @property
    def is_bypassed(self) -> bool:
        """Whether the model computes with the layer's weight and never calls the layer."""
        return self.sees == "nothing" and self.weight_read


def judge(uses: Collection[LayerUse], texts: int, length: int, mark: Tensor) -> None:
    """Say of each layer which tokens it sees, and in which order.

    Args:
        uses: what a dry run noted.
        texts: B.
        length: S.
        mark: (B, S): where the last hidden states show the marked token; nowhere if it was not seen.
    """
    for use in uses:
        use.texts = texts, length
        use.sees, use.order = _judged(use, texts, length, mark)
    padded = {sizes: use.order for use in uses if use.order.padded for sizes in use.tokens}
    for use in uses:
        if use.sees == "other tokens" and not any(mask.any() for mask in _masks(use)):
            orders = {padded.get(sizes) for sizes in use.tokens}
            order = orders.pop()
            if order is not None and not orders:
                use.sees, use.order = "tokens", order


def _judged(use: LayerUse, texts: int, length: int, mark: Tensor) -> tuple[Sees, TokenOrder]:
    if not use.tokens:
        return "nothing", _TEXTS_FIRST
    if all(each in _TEXTS_FIRST.sizes(texts, OTHERS) for each in (*use.tokens, *use.continued)):
        return "encoder tokens", _TEXTS_FIRST
    counts = {_count(each, texts) for each in use.continued}
    for order in (_TEXTS_FIRST, _TOKENS_FIRST):
        usual = order.sizes(texts, length)
        of_rank_4 = () if order.tokens_first else ((texts, 1, length),)
        if any(each not in (*usual, *of_rank_4) for each in use.tokens) or not _shows(use, order, texts, mark):
            continue
        if order.tokens_first:
            return ("tokens", order) if counts <= {1} else ("other tokens", order)
        if len(counts) == 1 and counts <= {*range(2, length + 2)}:
            return "cached tokens", order
        return ("tokens" if counts == {1} or all(each in usual for each in use.tokens) else "other tokens"), order
    count = padded_count(use, texts, length)
    if count and {count} == {_count(each, texts) for each in use.longer}:
        for order in (TokenOrder(padded=True), TokenOrder(tokens_first=True, padded=True)):
            fits = all(each in order.sizes(texts, count) for each in use.tokens)
            if fits and all(_is_mark(mask, order, texts, mark) for mask in _masks(use)):
                return "tokens", order
    return "other tokens", _TEXTS_FIRST


def padded_count(use: LayerUse, texts: int, length: int) -> int | None:
    """The tokens that every call holds for each text, where they are more than the text has; else None."""
    counts = {_count(each, texts) for each in use.tokens}
    return next(iter(counts)) if len(counts) == 1 and min(counts) > length else None


def _count(sizes: tuple[int, ...], texts: int) -> int:
    """The tokens of each text in these sizes; 0 where they are no tokens of the texts."""
    count, rest = divmod(math.prod(sizes), texts)
    shapes = ((texts, count), (texts, 1, count), (texts * count,), (count, texts))
    return count if not rest and sizes in shapes else 0


def _masks(use: LayerUse) -> Iterable[Tensor]:
    """Where the marked token was seen, call by call."""
    return (differences(a, b) for a, b in zip(use.prints, use.marked, strict=False) if a.shape == b.shape)


def _shows(use: LayerUse, order: TokenOrder, texts: int, mark: Tensor) -> bool:
    """Whether the layer saw the mark, if at all, where it must be in this order. Layers may have spread it."""
    return not mark.any() or all((_by_text(m, order, texts) & mark).any() for m in _masks(use) if m.any())


def _is_mark(mask: Tensor, order: TokenOrder, texts: int, mark: Tensor) -> bool:
    length = mark.shape[1]
    seen = _by_text(mask, order, texts)
    return bool(mark.any()) and torch.equal(seen[:, :length], mark) and not seen[:, length:].any()


def _by_text(mask: Tensor, order: TokenOrder, texts: int) -> Tensor:
    return order.by_text(mask[..., None, None], texts)[..., 0, 0]


def differences(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one shape differ; NaN is equal to NaN."""
    return (one != other) & ~(one.isnan() & other.isnan())
