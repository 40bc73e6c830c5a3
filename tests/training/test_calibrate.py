"""The temperature that predicts text best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramix import ConfigurationError, DataError, XLoraConfig, get_peft_model
from loramix.evaluation.losses import text_nats
from loramix.training import calibrate_temperature
from support.tiny import llama, tokens

Experts = Callable[[str], dict[str, str]]


def mixture(experts: Experts, **config: Any) -> Any:
    model: Any = get_peft_model(
        llama(), XLoraConfig(hidden_size=64, adapters=experts("llama"), router="prototypes", **config)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        model.router.weight.normal_()
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_temperature_of_the_search_has_a_smaller_loss(seed: int, experts: Experts) -> None:
    model, texts = mixture(experts, softmax_temperature=0.5), tokens(seed=seed).tolist()
    losses = {}
    for temperature in (1.0, 0.5, 0.25, 0.125, 0.0625):
        model.set_softmax_temperature(temperature)
        losses[temperature] = float(torch.cat(text_nats(model, texts, 1)).sum())
    model.set_softmax_temperature(0.5)
    found = calibrate_temperature(model, texts)
    assert losses[found] <= min(losses.values()) + 1e-4
    assert model.active_peft_config.softmax_temperature == found


def test_what_has_no_temperature_or_no_text_is_refused(experts: Experts) -> None:
    with pytest.raises(DataError, match="at least two tokens"):
        calibrate_temperature(mixture(experts), [[3], []])
    with pytest.raises(ConfigurationError, match="softmax over all experts"):
        calibrate_temperature(mixture(experts, enable_softmax=False), [[3, 4]])
