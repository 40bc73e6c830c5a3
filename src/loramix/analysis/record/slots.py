"""Which slots of a forward hold a token, and where a text begins in a row that holds several.

B, S: rows and tokens of a forward. T: slots that the cache held before. K: slots that a mask covers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from loramix.passes.cache import TwoPassCache, tokens_in


def held_before(cache: Any, inputs: Mapping[str, Any], length: int) -> int:
    """How many slots a cache held before a forward over `length` tokens.

    The mask shows it; without a mask there is no padding, and positions show it. In lockstep the cache itself may lag
    behind; a cache of one pass already holds the forward's tokens.
    """
    two_passes = isinstance(cache, TwoPassCache)
    filled = int(tokens_in(cache)) - (0 if two_passes else length)
    if filled <= 0 and not (two_passes and cache.torn):
        return 0
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        return mask.shape[1] - length
    positions = inputs.get("position_ids")
    if mask is None and isinstance(positions, Tensor) and positions.dim() == 2:
        return int(positions[:, 0].max())
    return filled


def real_slots(mask: Any, batch: int, length: int, before: int) -> Bool[Tensor, "B S"]:
    """False at padding.

    Args:
        mask: what the model was given: none, (B, T + S) with 0 at padding, or a mask of queries and keys
            (B or 1, 1, S, K), or several such by the kind of attention; padding is what does not see itself.
        batch: B.
        length: S.
        before: T.
    """
    if isinstance(mask, Mapping):
        masks = cast("Mapping[str, Any]", mask)
        mask = masks.get("full_attention", next(iter(masks.values()), None))
    everything = torch.ones(batch, length, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        return everything
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= before + length:
        return mask[:, before : before + length].detach().cpu() != 0
    if mask.dim() == 2 and mask.shape == (batch, length):
        return mask.detach().cpu() != 0
    if mask.dim() == 4 and mask.shape[2] == length:
        first = before if before + length <= mask.shape[3] else mask.shape[3] - length
        own = mask[:, 0, :, first : first + length].diagonal(dim1=1, dim2=2).detach().cpu()
        seen = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
        return seen.expand(batch, -1).clone()
    return everything


def packed_starts(inputs: Mapping[str, Any], batch: int, length: int) -> Bool[Tensor, "B S"] | None:
    """True where a text begins, in a row without a mask that holds several: positions do not continue there.

    So transformers tells them apart (`masking_utils.find_packed_sequence_indices`). None where there is one a row.
    """
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or inputs.get("attention_mask") is not None:
        return None
    if positions.shape[1] != length:
        return None
    starts = torch.ones(batch, length, dtype=torch.bool)
    starts[:, 1:] = (positions.detach().cpu().diff(dim=1) != 1).expand(batch, -1)
    return starts if bool(starts[:, 1:].any()) else None
