"""`linear`: its equation, its start, and that it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from loramix import ConfigurationError, XLoraConfig, get_peft_model
from loramix.routers import RouterSizes
from loramix.routers.linear import LinearRouter
from support.tiny import llama, tokens

Experts = Callable[[str], dict[str, str]]
RANKS = ((0, 0, 1), (1, 1), (0, 1, 1, 1))


def test_its_logits_are_those_of_its_equation() -> None:
    router = LinearRouter.build(XLoraConfig(hidden_size=8, adapters={}, router="linear"), RouterSizes(8, 3, 2, RANKS))
    torch.manual_seed(1)
    for parameter in router.parameters():
        parameter.data.normal_()
    first = 0
    for layer, ranks in enumerate(RANKS):
        h = torch.randn(2, 5, len(ranks))
        W = router.weight[:, first : first + len(ranks)]
        rms = h.square().mean(-1, keepdim=True).sqrt()
        assert_close(router.layer_logits(layer, h), (h / rms) @ W.T + router.bias[layer])
        assert torch.equal(router.layer_weight(layer), W)
        first += len(ranks)
    assert_close(router.layer_logits(0, torch.zeros(1, 3)), router.bias[:1])


@pytest.mark.parametrize("softmax", [True, False])
def test_it_starts_uniform_and_trains(softmax: bool, experts: Experts) -> None:
    config = XLoraConfig(hidden_size=64, adapters=experts("llama"), router="linear", enable_softmax=softmax)
    model: Any = get_peft_model(llama(), config)
    optimizer, losses = torch.optim.Adam(model.router.parameters(), lr=0.05), []
    for _ in range(6):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) == 1:
            assert_close(model.get_latest_scalings(), torch.full_like(model.get_latest_scalings(), 1 / 3))
    assert losses[-1] < losses[0] - 1e-3


def test_what_belongs_to_a_scaling_pass_is_refused(experts: Experts) -> None:
    for kind in ("linear", "arrow", "norm"):
        with pytest.raises(ConfigurationError, match="scaling_pass_value belongs to a scaling pass"):
            get_peft_model(llama(), XLoraConfig(adapters=experts("llama"), router=kind, scaling_pass_value=0.5))
        with pytest.raises(ConfigurationError, match="belongs to the classifier"):
            XLoraConfig(adapters=experts("llama"), router=kind, xlora_depth=2)
