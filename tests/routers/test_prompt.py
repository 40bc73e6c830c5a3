"""Weights over the experts from one text: their equations, and what they cannot be made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix import RoutingError
from loramix.routers.prompt import Signal, response_weights, similarity_weights


def slow_responses(answers: Tensor, signal: Signal, top_k: int) -> Tensor:
    found = torch.zeros(answers.shape[:2])
    for row, experts in enumerate(answers):
        signals: list[float] = []
        for answer in experts.tolist():
            exponentials = [math.exp(value) for value in answer]
            p = [value / sum(exponentials) for value in exponentials]
            entropy = -sum(value * math.log(value) for value in p)
            signals.append(math.sqrt(sum(value**2 for value in answer)) if signal == "norm" else 1 / entropy)
        chosen = sorted(range(len(signals)), key=lambda e: -signals[e])[:top_k]
        for expert in chosen:
            found[row, expert] = signals[expert] / sum(signals[e] for e in chosen)
    return found


@pytest.mark.parametrize("signal", ["norm", "entropy"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_responses_follow_their_equation(signal: Signal, top_k: int) -> None:
    answers = torch.randn(3, 4, 7)
    found = response_weights(answers, signal, top_k)
    assert_close(found, slow_responses(answers, signal, top_k), atol=1e-5, rtol=1e-5)
    assert_close(found.sum(-1), torch.ones(3))
    order = torch.tensor([2, 0, 3, 1])
    assert_close(response_weights(answers[:, order], signal, top_k), found[:, order])
    assert top_k < 4 or torch.equal(response_weights(answers, signal), found)


@pytest.mark.parametrize("signal", ["norm", "entropy"])
def test_an_expert_that_adds_nothing_has_no_weight(signal: Signal) -> None:
    answers = torch.randn(2, 3, 5)
    answers[:, 1] = 0
    found = response_weights(answers, signal, top_k=3)
    assert (found[:, 1] == 0).all()
    assert (found[:, [0, 2]] > 0).all()
    answers[1] = 0
    with pytest.raises(RoutingError, match="text 1, to which no expert adds anything"):
        response_weights(answers, signal)


def test_one_feature_alone_has_no_entropy_and_stays_finite() -> None:
    answers = torch.zeros(1, 2, 4)
    answers[0, 0, 0] = 1e4
    answers[0, 1] = torch.randn(4)
    found = response_weights(answers, "entropy")
    assert found.isfinite().all()
    assert found[0, 0] > 0.99


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_similarity_follows_its_equation(temperature: float) -> None:
    text, examples = torch.randn(2, 6), torch.randn(3, 6)
    for row, weights in zip(text, similarity_weights(text, examples, temperature), strict=True):
        cosines = torch.stack([row @ each / row.norm() / each.norm() for each in examples])
        assert_close(weights, torch.softmax(cosines / temperature, -1), atol=1e-5, rtol=1e-5)
