"""The router of prototypes: one linear map of the hidden state, with a scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from loramix import AdapterMismatchError, ConfigurationError, PeftModel, XLoraConfig, get_peft_model
from loramix.formats import describe
from loramix.routers import RouterSizes
from loramix.routers.prototypes import PrototypeRouter
from support.tiny import llama, tokens

Experts = Callable[[str], dict[str, str]]


def router(layerwise: bool = False, experts: int = 3) -> PrototypeRouter:
    config = XLoraConfig(hidden_size=8, adapters={}, router="prototypes", layerwise_scalings=layerwise)
    made = PrototypeRouter.build(config, RouterSizes(8, 5, experts))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


def mixture(experts: Experts, **config: Any) -> Any:
    return get_peft_model(llama(), XLoraConfig(adapters=experts("llama"), router="prototypes", **config)).eval()


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_logits_are_those_of_the_equation(layerwise: bool) -> None:
    one = router(layerwise)
    hidden = torch.randn(2, 4, 8)
    for layer, scale in enumerate(one.scale):
        for expert in range(3):
            expected = scale * ((hidden * one.weight[expert]).sum(-1) + one.bias[expert])
            assert_close(one.distinct(hidden)[:, :, layer, expert], expected)
    assert len(one.scale) == (5 if layerwise else 1)


def test_removing_an_expert_leaves_the_logits_of_the_others() -> None:
    whole, kept = router(), [0, 2]
    fewer = router(experts=2)
    with torch.no_grad():
        fewer.weight.copy_(whole.weight[kept])
        fewer.bias.copy_(whole.bias[kept])
        fewer.scale.copy_(whole.scale)
    hidden = torch.randn(2, 4, 8)
    assert_close(fewer.distinct(hidden), whole.distinct(hidden)[..., kept])


@pytest.mark.parametrize("gating", [{}, {"softmax_temperature": 0.5}, {"enable_softmax": False}])
def test_it_starts_at_the_uniform_mixture(gating: dict[str, Any], experts: Experts) -> None:
    model = mixture(experts, layerwise_scalings=True, **gating)
    with torch.no_grad():
        found = model(tokens()).logits
        with model.fixed_scalings([1 / 3] * 3):
            assert_close(model(tokens()).logits, found)


def test_it_trains_and_its_file_says_what_it_is(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts).train()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"internal_xlora_router.{name}" for name in ("weight", "bias", "scale")
    ]
    model(tokens(), labels=tokens()).loss.backward()
    assert model.router.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    told = describe(tmp_path)
    assert told.router is not None
    assert (told.router.kind, told.router.parameters) == ("prototypes", 3 * 64 + 3 + 1)


def test_autocast_leaves_its_precision_alone() -> None:
    one, hidden = router(), torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = one.distinct(hidden)
    assert torch.equal(found, one.distinct(hidden))
    assert one.distinct(hidden.bfloat16()).dtype == torch.float32


def test_another_width_or_number_of_experts_is_refused(experts: Experts, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="hidden size is 8"):
        router().distinct(torch.randn(1, 2, 9))
    with pytest.raises(AdapterMismatchError, match="as many experts"):
        router().load(router(experts=4).state_dict())
    mixture(experts).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="hidden_size must be the base model's"):
        PeftModel.from_pretrained(llama(hidden_size=32), tmp_path)


def test_settings_of_the_classifier_are_refused(experts: Experts) -> None:
    with pytest.raises(ConfigurationError, match="xlora_depth"):
        mixture(experts, xlora_depth=2)
