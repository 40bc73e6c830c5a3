"""The price of finding out that no draft is right: at most 3 % more row-forwards than two passes have, from the start.

The text is forced on the model by a logits processor: random tokens, which neither pass would choose and no n-gram of
which comes again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loramix.decoding.requests import request
from loramix.passes.state import state_of
from support.generation import forced, generated, random_text, report_of
from support.mixtures import mixture
from support.tiny import llama, tokens

MOST = 1.03
START = 9  # tokens of the prompt
LENGTHS = (32, 64, 128, 256)
TEXT = random_text(512)


@pytest.fixture(scope="module")
def model(experts: Callable[[str], dict[str, str]]) -> Any:
    return mixture(experts("llama"), base=llama(max_position_embeddings=512), layerwise_scalings=True)


def ratio(model: Any, batch: int) -> float:
    report = report_of(model)
    return report.row_forwards / (2 * batch * report.tokens)


@pytest.mark.parametrize("batch", [1, 2])
def test_drafts_that_are_never_right_cost_next_to_nothing(batch: int, model: Any) -> None:
    """Counted on the way to the longest text, in the first generation; and in the next one, which knows all prices."""
    found: dict[int, float] = {}

    def count(ids: Tensor, scores: Tensor) -> Tensor:
        report = request().report
        if ids.shape[1] - START + 1 in LENGTHS and report is not None:
            assert report.accepted_drafts == 0
            found[report.tokens + 1] = report.row_forwards / (2 * batch * report.tokens)
        return scores

    state_of(model).measurements.clear()
    text = forced(TEXT.__getitem__)
    for new in (LENGTHS[-1], LENGTHS[0]):
        generated(model, input_ids=tokens(batch, START), max_new_tokens=new, logits_processor=[count, text])
        assert report_of(model).reason is None
        assert report_of(model).tokens == new - 1
        assert list(found) == [length for length in LENGTHS if length <= new]
        assert max(found.values()) <= MOST
        found.clear()


@pytest.mark.parametrize("batch", [1, 2])
def test_nor_after_texts_whose_drafts_were_right(batch: int, model: Any) -> None:
    """What an earlier text led to expect is given up at once."""
    state_of(model).measurements.clear()
    for new in LENGTHS[:2]:
        model.set_global_scaling_weight(0.0)
        generated(model, input_ids=tokens(batch), max_new_tokens=32)
        assert report_of(model).accepted_drafts > 10
        model.set_global_scaling_weight(1.0)
        inputs = {"input_ids": tokens(batch), "max_new_tokens": new, "logits_processor": [forced(TEXT.__getitem__)]}
        generated(model, **inputs)
        assert report_of(model).accepted_drafts == 0
        assert ratio(model, batch) <= MOST


def test_a_head_that_is_more_than_a_product_is_tried_out_within_the_same_bound(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but rounds of lockstep tells there whether drafts are right."""

    class Scaled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    head = model.get_output_embeddings()
    monkeypatch.setattr(head, "__class__", Scaled)
    for new in LENGTHS[:2]:
        state_of(model).measurements.clear()
        inputs = {"input_ids": tokens(1), "max_new_tokens": new, "logits_processor": [forced(TEXT.__getitem__)]}
        generated(model, **inputs)
        report = report_of(model)
        assert report.accepted_drafts == 0
        assert 0 < report.drafts < 4
        assert ratio(model, 1) <= MOST
