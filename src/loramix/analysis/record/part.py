"""The tokens of a record as tensors.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some of a record's tokens.

    Attributes:
        sequence: the number of each token's text.
        position: its position in the text, from 0.
        token: its id; -1 where the model was given embeddings.
        scalings: its final scalings s, on the CPU.
    """

    sequence: Int[Tensor, " N"]
    position: Int[Tensor, " N"]
    token: Int[Tensor, " N"]
    scalings: Float[Tensor, "N L E"]

    def __len__(self) -> int:
        return len(self.token)

    def __getitem__(self, rows: Int[Tensor, " M"] | Bool[Tensor, " N"] | slice) -> Part:
        return Part(self.sequence[rows], self.position[rows], self.token[rows], self.scalings[rows])

    def by_text(self) -> Part:
        """The same tokens, sorted by text and by position."""
        order = torch.argsort(self.position, stable=True)
        return self[order[torch.argsort(self.sequence[order], stable=True)]]

    def run_starts(self) -> list[int]:
        """Where runs of consecutive tokens of one text begin."""
        follows = (self.sequence.diff() == 0) & (self.position.diff() == 1)
        return [0, *(torch.nonzero(~follows).flatten() + 1).tolist()] if len(self) else []

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as a file holds them."""
        return {name: tensor.contiguous() for name, tensor in vars(self).items()}


def joined(parts: Iterable[Part], layers: int, experts: int) -> Part:
    """All parts as one; without any, an empty one."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        none = torch.zeros(0, dtype=torch.long)
        return Part(none, none, none, torch.zeros(0, layers, experts))
    columns = zip(*(part.tensors().values() for part in parts), strict=True)
    return Part(*(torch.cat(column) for column in columns))
