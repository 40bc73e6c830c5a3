"""A record as a table of pandas'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from loramix.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from loramix.analysis.record.record import RoutingRecord


def to_pandas(record: RoutingRecord) -> Any:
    """A row for each token, layer and expert: sequence, position, token, layer, expert, scaling.

    Raises:
        UnsupportedOperationError: pandas is missing.
    """
    try:
        import pandas  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise UnsupportedOperationError(
            "A table needs pandas.",
            received="an installation without it",
            remedy="pip install 'loramix[inspect]'",
        ) from error
    whole = record.part
    count, layers, experts = whole.scalings.shape
    each = layers * experts
    category = pandas.Categorical.from_codes
    layer = torch.arange(layers).repeat_interleave(experts).repeat(count)
    expert = torch.arange(experts).repeat(count * layers)
    return pandas.DataFrame(
        {
            "sequence": whole.sequence.repeat_interleave(each).numpy(),
            "position": whole.position.repeat_interleave(each).numpy(),
            "token": whole.token.repeat_interleave(each).numpy(),
            "layer": category(layer.numpy(), record.layers),
            "expert": category(expert.numpy(), record.experts),
            "scaling": whole.scalings.flatten().numpy(),
        }
    )
