"""What a record must hold: texts from their beginning, as one forward reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from loramix.analysis import RoutingRecord

Direct = Callable[[Any, Any], Tensor]
PADDING = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def assert_is(record: RoutingRecord, model: Any, text: Any, direct: Direct) -> None:
    """The record holds one text, from its beginning, as one forward reads it."""
    text = torch.as_tensor(text)
    assert record.tokens.tolist() == text.tolist()
    assert record.positions.tolist() == list(range(len(text)))
    assert_close(record.scalings, direct(model, text), atol=1e-5, rtol=1e-4)


def assert_holds(record: RoutingRecord, model: Any, texts: list[Any], direct: Direct) -> None:
    """The record holds these texts, in this order, and nothing else."""
    assert record.sequences == list(range(len(texts)))
    assert record.kept == record.seen == sum(map(len, texts))
    for number, text in enumerate(texts):
        assert_is(record.sequence(number), model, text, direct)
