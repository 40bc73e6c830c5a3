"""The closed form of a router's start does not depend on the order of its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix.routers import Gating
from loramix.routers.start import Moments, Sample


def labelled(count: int = 400) -> tuple[Tensor, Tensor]:
    """Tokens of four experts, the first of which is the easiest to tell, sorted by expert."""
    ids = torch.arange(4).repeat_interleave(count)
    centres = torch.tensor([[9.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return centres[ids] + 0.7 * torch.randn(len(ids), 4), ids


def fitted(features: Tensor, ids: Tensor, batch: int = 50) -> tuple[float, float]:
    moments = Moments(4, 4)
    for part, numbers in zip(features.split(batch), ids.split(batch), strict=True):
        moments.add(part, numbers)
    found = moments.fit("labels", Gating())
    return found.accuracy, found.scale


def test_sorted_labels_give_the_scale_and_accuracy_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    features, ids = labelled()
    accuracy, scale = fitted(features, ids)
    monkeypatch.setattr("loramix.routers.start._SAMPLE", 300)
    order = torch.randperm(len(ids))
    for sampled in (fitted(features, ids), fitted(features[order], ids[order])):
        assert sampled[0] == pytest.approx(accuracy, abs=0.08)
        assert sampled[1] == pytest.approx(scale, rel=0.15)


def test_a_sample_has_each_token_as_likely_as_any_other() -> None:
    sample = Sample(200)
    for number in range(40):
        sample.add(torch.full((100, 1), float(number)), torch.full((100,), number // 10))
    values, experts = sample.tokens()
    assert values.shape == (200, 1)
    assert torch.equal(experts, values[:, 0].long() // 10)
    assert experts.bincount().min() > 30
    assert len(values.unique()) > 30
    small = Sample(200)
    small.add(torch.arange(5.0).unsqueeze(1), torch.arange(5))
    assert_close(small.tokens(), (torch.arange(5.0).unsqueeze(1), torch.arange(5)))
