"""The causal ceiling: the posterior over experts, and the experts mixed by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from loramix import ConfigurationError, XLoraConfig, get_peft_model
from loramix.evaluation import causal_ceiling
from loramix.evaluation.ceiling import posterior
from loramix.evaluation.losses import text_nats
from loramix.evaluation.passages import Passage
from support.tiny import llama, tokens

Experts = Callable[[str], dict[str, str]]


@pytest.mark.parametrize("change", [0.0, 0.1])
def test_the_posterior_is_that_of_the_equation(change: float) -> None:
    nats = torch.rand(6, 3) * 4
    found = posterior(nats, change)
    v = [1 / 3] * 3
    assert_close(found[0], torch.tensor(v))
    for t in range(6):
        w = [v[e] * math.exp(-float(nats[t, e])) for e in range(3)]
        v = [(1 - change) * one / sum(w) + change / 3 for one in w]
        assert_close(found[t + 1], torch.tensor(v))


def test_it_survives_likelihoods_that_are_far_apart() -> None:
    found = posterior(torch.tensor([[0.0, 500.0], [900.0, 0.0]]), 0.0)
    assert_close(found, torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]))


def passages() -> list[Passage]:
    lengths = (9, 6)
    texts = [tokens()[row, :length].tolist() for row, length in enumerate(lengths)]
    return [Passage(ids, ["a", "b"] * 4 if len(ids) == 9 else ["a"] * 5, [1] * (len(ids) - 1)) for ids in texts]


@pytest.mark.parametrize("router", ["classifier", "static"])
def test_it_mixes_each_token_by_the_text_before_it(router: str, experts: Experts) -> None:
    settings = XLoraConfig(hidden_size=64, adapters=experts("llama"), router=router)
    model: Any = get_peft_model(llama(), settings)
    found, scalings, averaged = causal_ceiling(model, passages(), change=0.05), 0.0, 0.0
    for passage in passages():
        alone = []
        for expert in range(3):
            with model.fixed_scalings([float(expert == each) for each in range(3)]):
                alone.append(text_nats(model, [passage.ids], 1)[0])
        nats = torch.stack(alone, -1)
        weights = posterior(nats, 0.05)
        averaged -= float(((-nats).exp() * weights[:-1]).sum(-1).log().sum())
        # the last token alone: its scalings stand after those of the tokens before it
        scalings += float(_routed(model, passage.ids, weights).sum())
    assert_close(sum(score.nats for score in found.probabilities.values()), averaged, atol=1e-4, rtol=1e-5)
    assert_close(sum(score.nats for score in found.scalings.values()), scalings, atol=1e-4, rtol=1e-5)
    assert {group: score.tokens for group, score in found.scalings.items()} == {"a": 9, "b": 4}
    assert model.training is False


def _routed(model: Any, ids: list[int], weights: torch.Tensor) -> torch.Tensor:
    """−ln p with these scalings, by a loop over the tokens with the base model's cache and fixed scalings."""
    cache, found = None, []
    with torch.no_grad():
        for place, token in enumerate(ids):
            with model.fixed_scalings(weights[place]):
                out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0, -1].log_softmax(-1))
    return -torch.stack([row[token] for row, token in zip(found, ids[1:], strict=False)])


def test_a_change_that_is_no_probability_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="change is a probability"):
        posterior(torch.zeros(2, 2), 1.0)
