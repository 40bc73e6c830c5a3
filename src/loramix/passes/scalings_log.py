"""A bounded log of scalings for PEFT's scalings-log methods; it holds no autograd graphs.

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

CAPACITY = 10_000


class ScalingsLog:
    """The scalings of the last forwards, oldest first, detached and on the CPU.

    Args:
        capacity: how many forwards are kept; older ones are dropped.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.enabled = False
        self._entries: deque[Tensor] = deque(maxlen=capacity)

    def add(self, scalings: Tensor, layers: int) -> None:
        """Keep a copy, if logging is enabled: (B, S, L, E), or (B, S, 1, E) where all L layers share them."""
        if self.enabled:
            self._entries.append(scalings.detach().to("cpu", copy=True).expand(-1, -1, layers, -1))

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def entries(self) -> list[Tensor]:
        """The entries, in a new list."""
        return list(self._entries)

    def bucketed(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The entries by sequence length S: their positions in the log, and the tensors."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, scalings in enumerate(self._entries):
            positions, tensors = buckets.setdefault(scalings.shape[1], ([], []))
            positions.append(position)
            tensors.append(scalings)
        return buckets
