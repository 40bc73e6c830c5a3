"""What is measured: sizes of the base model and of the mixture on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal["small", "wide", "tiny"]


@dataclass(frozen=True)
class Size:
    """A Llama and a mixture on all seven linear layers of each of its blocks.

    Args:
        hidden: H.
        blocks: transformer blocks; L = 7 · blocks.
        intermediate: width of the SwiGLU layers.
        heads: query heads.
        kv_heads: key and value heads.
        vocabulary: rows of the untied head.
        experts: E.
        rank: r of each expert; R = E · r.
        depth: of the router; 1 is the default of `XLoraConfig`.
        router_width: width of the router's inner layers, where depth > 1.
        layerwise: whether each adapted layer has scalings of its own; no by default, as in `XLoraConfig`.
        prompt: tokens of the prompt.
        lengths: generated tokens at which growth is looked at.
    """

    hidden: int
    blocks: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int
    rank: int
    prompt: int
    lengths: tuple[int, ...]
    depth: int = 1
    router_width: int = 2048
    layerwise: bool = False

    def attention(self, seen: float) -> float:
        """Multiplications of a token that sees `seen` tokens, in one pass: its scores and its mean of the values."""
        return 2 * self.blocks * self.hidden * seen

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of one pass for so many tokens, in float32."""
        return 4 * 2 * self.blocks * self.kv_heads * (self.hidden // self.heads) * tokens


SIZES: dict[Name, Size] = {
    "small": Size(
        hidden=512,
        blocks=8,
        intermediate=1376,
        heads=8,
        kv_heads=8,
        vocabulary=32_000,
        experts=8,
        rank=8,
        prompt=64,
        lengths=(16, 32, 64, 128),
    ),
    "wide": Size(
        hidden=1024,
        blocks=4,
        intermediate=2752,
        heads=16,
        kv_heads=16,
        vocabulary=32_000,
        experts=4,
        rank=16,
        prompt=256,
        lengths=(16, 32),
    ),
    "tiny": Size(
        hidden=32,
        blocks=1,
        intermediate=48,
        heads=4,
        kv_heads=2,
        vocabulary=96,
        experts=2,
        rank=2,
        prompt=4,
        lengths=(2, 3),
    ),
}
