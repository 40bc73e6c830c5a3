"""Products with a module's weight that its own forward makes, where there is no layer to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = frozenset({Tensor.to, Tensor.type, Tensor.float})


class WeightProducts(TorchFunctionMode):
    """Inside, `F.linear(x, weight)` is what `then(x, y)` makes of its result y; the weight may be cast on its way.

    Attributes:
        count: how many such products there were.
    """

    def __init__(self, weight: Tensor, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._weights, self._then = [weight], then

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and self._is_weight(args[1:2]):
            self.count += 1
            return self._then(args[0], out)
        if func in _CASTS and self._is_weight(args[:1]):
            self._weights.append(out)
        return out

    def _is_weight(self, first: tuple[Any, ...]) -> bool:
        return any(first[0] is weight for weight in self._weights) if first else False
