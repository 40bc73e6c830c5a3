"""A record as a table of pandas'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loramix.analysis.record.part import Part
from loramix.errors import UnsupportedOperationError


def table_of(part: Part, layers: Sequence[str], experts: Sequence[str]) -> Any:
    """A row for each token, layer and expert: sequence, position, token, layer, expert, scaling.

    Args:
        part: the tokens.
        layers: the names of the L layers.
        experts: the names of the E experts.

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
    each = len(layers) * len(experts)
    category = pandas.Categorical.from_codes
    layer = torch.arange(len(layers)).repeat_interleave(len(experts)).repeat(len(part))
    expert = torch.arange(len(experts)).repeat(len(part) * len(layers))
    return pandas.DataFrame(
        {
            "sequence": part.sequence.repeat_interleave(each).numpy(),
            "position": part.position.repeat_interleave(each).numpy(),
            "token": part.token.repeat_interleave(each).numpy(),
            "layer": category(layer.numpy(), layers),
            "expert": category(expert.numpy(), experts),
            "scaling": part.scalings.flatten().numpy(),
        }
    )
