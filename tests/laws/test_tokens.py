"""What tokens and rows are to each other: causality, caching, padding, independence of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from support.mixtures import SPARSE, far, logits_of, mixture
from support.tiny import ARCHITECTURES, tokens

Experts = Callable[[str], dict[str, str]]
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, experts: Experts) -> Any:
    """Layerwise and sparse, with a scaling pass that is not the base model's: whatever can leak would."""
    settings = {"layerwise_scalings": True, "scaling_pass_value": 0.2, **SPARSE}
    return mixture(experts(request.param), request.param, **settings)


def test_scalings_depend_on_no_later_token(model: Any) -> None:
    ids = tokens()
    changed = torch.cat([ids[:, :5], tokens(length=4, seed=7)], dim=1)
    before = logits_of(model, ids), model.get_latest_scalings()
    after = logits_of(model, changed), model.get_latest_scalings()
    for one, other in zip(before, after, strict=True):
        assert_close(one[:, :5], other[:, :5], **TOLERANCE)
        assert far(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3], [6, 3], [9]], ids=str)
def test_cached_equals_uncached_whatever_the_chunks(model: Any, chunks: list[int]) -> None:
    ids, cache, logits, scalings = tokens(), None, [], []
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
            scalings.append(model.get_latest_scalings())
    assert_close(torch.cat(logits, dim=1), logits_of(model, use_cache=False), **TOLERANCE)
    assert_close(torch.cat(scalings, dim=1), model.get_latest_scalings(), **TOLERANCE)
    assert cache.get_seq_length() == cache.base.get_seq_length() == 9


def test_left_padding_does_not_change_real_tokens(model: Any) -> None:
    ids = tokens()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits_of(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
    scalings = model.get_latest_scalings()[:, 3:]
    assert_close(got, logits_of(model, ids), **TOLERANCE)
    assert_close(scalings, model.get_latest_scalings(), **TOLERANCE)


def test_rows_of_a_batch_are_independent(model: Any) -> None:
    together = logits_of(model)
    apart = torch.cat([logits_of(model, row) for row in tokens().split(1)])
    assert_close(together, apart, **TOLERANCE)
    assert far(together[0], together[1])
