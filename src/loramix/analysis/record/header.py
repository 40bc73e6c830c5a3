"""What a record says of all its tokens: of which mixture they are, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loramix.config.xlora import XLoraConfig
from loramix.passes.two_pass import MixtureState

ALL_LAYERS = "all layers"
_SETTINGS = (
    *("enable_softmax", "enable_softmax_topk", "top_k_lora", "softmax_temperature", "scaling_pass_value"),
    "global_scaling_weight",
)


def without_shared_part(names: Sequence[str]) -> list[str]:
    """Names of layers without the modules that all of them lie in."""
    split = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(parts) > shared + 1 for parts in split):
        if len({parts[shared] for parts in split}) > 1:
            break
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


@dataclass
class Header:
    """What a record says of all its tokens.

    Attributes:
        experts: their names, in the order of the scalings.
        palette: those of all experts of the mixture, of which a selection has fewer: what colours go by.
        layers: the names of the adapted layers; only `ALL_LAYERS` where they share their scalings.
        adapted: those of all adapted layers.
        settings: the mixture's, when the first token was recorded.
        changed: whether they were others later.
        forks: text -> the text that it goes on with, and how many tokens of that come before its own.
        seen: how many tokens were read.
        sample: whether tokens are missing that were read.
    """

    experts: list[str] = field(default_factory=list[str])
    palette: list[str] = field(default_factory=list[str])
    layers: list[str] = field(default_factory=list[str])
    adapted: list[str] = field(default_factory=list[str])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    changed: bool = False
    forks: dict[int, tuple[int, int]] = field(default_factory=dict[int, "tuple[int, int]"])
    seen: int = 0
    sample: bool = False

    @staticmethod
    def of(state: MixtureState) -> Header:
        """A mixture's, before a token was read."""
        shared = isinstance(state.config, XLoraConfig) and not state.config.layerwise_scalings and len(state.paths) > 1
        layers = [ALL_LAYERS] if shared else list(state.paths)
        return Header(list(state.names), list(state.names), layers, list(state.paths))

    @property
    def shared(self) -> bool:
        """Whether all layers share their scalings."""
        return self.layers == [ALL_LAYERS]

    def note(self, config: XLoraConfig) -> None:
        """A forward was read with these settings."""
        settings = {name: getattr(config, name) for name in _SETTINGS}
        self.changed |= bool(self.settings) and settings != self.settings
        self.settings = self.settings or settings
