"""The header of a record: the mixture, its settings, and which tokens are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loramix.passes.state import MixtureState

ALL_LAYERS = "all layers"


def without_shared_part(names: Sequence[str]) -> list[str]:
    """Names of layers without the modules that contain all of them."""
    split = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(parts) > shared + 1 for parts in split):
        if len({parts[shared] for parts in split}) > 1:
            break
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


def counted(number: int, what: str) -> str:
    """A number and a noun, such as "1 token" or "2 tokens"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass
class Header:
    """What is the same for all tokens of a record.

    Attributes:
        experts: the names of the experts, in the order of the scalings.
        palette: the names of all experts of the mixture, which colours go by; a selection has fewer experts.
        layers: the names of the recorded layers; only `ALL_LAYERS` where they share their scalings.
        adapted: the names of all adapted layers.
        settings: the mixture's gating settings when the first token was recorded.
        changed: whether the settings changed later.
        forks: text -> the text that it continues, and how many tokens of that precede its own.
        encoder_texts: the texts that an encoder has read, for a decoder.
        seen: the number of tokens that were read.
        sample: whether tokens that were read are missing.
    """

    experts: list[str] = field(default_factory=list[str])
    palette: list[str] = field(default_factory=list[str])
    layers: list[str] = field(default_factory=list[str])
    adapted: list[str] = field(default_factory=list[str])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    changed: bool = False
    forks: dict[int, tuple[int, int]] = field(default_factory=dict[int, "tuple[int, int]"])
    encoder_texts: list[int] = field(default_factory=list[int])
    seen: int = 0
    sample: bool = False

    @staticmethod
    def of(state: MixtureState) -> Header:
        """The header of a record of this mixture, before a token was read."""
        shared = not state.config.layerwise_scalings and len(state.paths) > 1
        layers = [ALL_LAYERS] if shared else list(state.paths)
        return Header(list(state.names), list(state.names), layers, list(state.paths))

    @property
    def shared(self) -> bool:
        """Whether all layers share their scalings."""
        return self.layers == [ALL_LAYERS]

    def describe(self, kept: int) -> str:
        """What a record with so many tokens holds, in one sentence; and why, if it is nothing."""
        if not self.seen and not kept:
            return (
                "Nothing was recorded: no forward made scalings. With adapters disabled, or with fixed scalings, none "
                "are made."
            )
        text = f"{counted(kept, 'token')}, {counted(len(self.experts), 'expert')}, "
        adapted = counted(len(self.adapted), "layer")
        text += f"one routing for all {adapted}" if self.shared else counted(len(self.layers), "layer")
        if self.seen > kept:
            text += f"; a uniform sample of the {self.seen} tokens that were read"
        elif self.sample:
            text += "; of a sample of the tokens that were read"
        if self.changed:
            text += "; the mixture's settings changed meanwhile"
        return text[0].upper() + text[1:] + "."

    def note_settings(self, state: MixtureState) -> None:
        """Remember the settings of a forward that is recorded."""
        given = state.settings()
        settings = asdict(given.gating) | {
            "scaling_pass_value": given.scaling_pass_value,
            "global_scaling_weight": given.global_scaling_weight,
        }
        self.changed |= bool(self.settings) and settings != self.settings
        self.settings = self.settings or settings
