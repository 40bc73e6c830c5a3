"""Records made by hand, whose numbers are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loramix.analysis.record.header import ALL_LAYERS, Header
from loramix.analysis.record.part import Part
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.record.stores import MemorySource


def record_of(
    scalings: Tensor,
    *,
    experts: Sequence[str] | None = None,
    texts: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    shared: bool = False,
    tokenizer: Any = None,
    parts: int = 1,
) -> RoutingRecord:
    """A record of scalings (N, L, E), of texts of the given lengths; all of one text unless said."""
    count, layers, number = scalings.shape
    lengths = torch.tensor(texts or [count])
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.cat([torch.arange(length) for length in lengths.tolist()])
    ids = torch.arange(count) if tokens is None else torch.tensor(tokens)
    names = list(experts or [f"e{i}" for i in range(number)])
    adapted = [f"layers.{i // 2}.{'q_proj' if i % 2 == 0 else 'v_proj'}" for i in range(4 if shared else layers)]
    header = Header(names, names, [ALL_LAYERS] if shared else adapted, adapted, {"top_k_lora": None}, seen=count)
    size = -(-count // parts) or 1
    whole = Part(sequence, position, ids, scalings.float())
    return RoutingRecord(header, MemorySource([whole[i : i + size] for i in range(0, count, size)]), tokenizer)


def random_record(count: int = 12, layers: int = 4, experts: int = 3, seed: int = 0, **options: Any) -> RoutingRecord:
    """A dense routing, drawn with a seed."""
    generator = torch.Generator().manual_seed(seed)
    return record_of(torch.softmax(2 * torch.randn(count, layers, experts, generator=generator), -1), **options)
