"""The reference of a training computes what its model computed when it was made, and never anything else."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from loramix import LoraConfig, UnsupportedOperationError, XLoraModel, create_reference_model, get_peft_model
from loramix._compat import enable_checkpointing, is_checkpointing
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import attach
from support.mixtures import far, logits_of
from support.tiny import llama, tokens
from support.usages import USAGES, Adapters, build


def shared(model: Any, reference: Any) -> dict[str, bool]:
    """Whether each parameter is one object in both."""
    own = dict(model.named_parameters())
    return {name: parameter is own[name] for name, parameter in reference.named_parameters()}


def train(model: Any) -> None:
    """A step that moves everything that trains."""
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    model.eval()


@pytest.mark.parametrize("usage", USAGES)
def test_it_computes_the_same_and_stays_while_the_model_trains(usage: str, adapters: Adapters) -> None:
    model = build(adapters, usage)
    before = logits_of(model)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reference = create_reference_model(model.train())
    assert isinstance(reference, XLoraModel)
    assert shared(model, reference) == {name: name not in training for name, _ in model.named_parameters()}
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert model.training
    train(model)
    assert far(logits_of(model), before)
    assert torch.equal(logits_of(reference), before)


def warm(model: Any) -> None:
    model.set_softmax_temperature(30.0)


def fix(model: Any) -> None:
    model.fix_routing([1.0, 0.0, 0.0])


def disable(model: Any) -> None:
    model.disable_adapter_layers()


def hook(model: Any) -> None:
    class Uniform(RoutingHook):
        def logits(self, logits: torch.Tensor, training: bool) -> torch.Tensor:
            return torch.zeros_like(logits)

    attach(model, Uniform())


def unload(model: Any) -> None:
    model.unload()


CHANGES = [warm, fix, disable, hook, unload]


@pytest.mark.parametrize("change", CHANGES)
def test_it_does_not_follow_its_model(change: Callable[[Any], None], adapters: Adapters) -> None:
    model = build(adapters)
    reference, before = create_reference_model(model), logits_of(model)
    change(model)
    assert far(logits_of(model), before)
    assert torch.equal(logits_of(reference), before)


@pytest.mark.parametrize("change", CHANGES)
def test_its_model_does_not_follow_it(change: Callable[[Any], None], adapters: Adapters) -> None:
    model = build(adapters)
    reference, before = create_reference_model(model), logits_of(model)
    change(reference)
    assert torch.equal(logits_of(model), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.startswith("internal_xlora_classifier.") for name in trained)


@pytest.mark.parametrize("change", [warm, fix, disable])
def test_it_takes_what_is_set_at_the_time(change: Callable[[Any], None], adapters: Adapters) -> None:
    model = build(adapters)
    change(model)
    assert torch.equal(logits_of(create_reference_model(model)), logits_of(model))


def test_objectives_see_the_model_alone(adapters: Adapters) -> None:
    class Counting(RoutingHook):
        seen = 0

        def routed(self, output: RouterOutput) -> None:
            self.seen += 1

    model, counting = build(adapters), Counting()
    attach(model, counting)
    logits_of(create_reference_model(model))
    assert counting.seen == 0
    logits_of(model)
    assert counting.seen == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_checkpointing_of_the_model_is_not_that_of_the_reference(adapters: Adapters) -> None:
    model = build(adapters)
    reference = create_reference_model(model)
    enable_checkpointing(model, use_reentrant=False)
    assert not is_checkpointing(reference)
    assert torch.equal(logits_of(create_reference_model(model.train())), logits_of(reference))


def test_weights_of_the_base_model_that_train_are_copied(adapters: Adapters) -> None:
    model = build(adapters)
    model.requires_grad_(True)
    reference, before = create_reference_model(model), logits_of(model)
    assert not any(shared(model, reference).values())
    train(model)
    assert torch.equal(logits_of(reference), before)


def test_what_a_trainer_has_put_on_the_model_stays_there(adapters: Adapters) -> None:
    """A forward that closes over the model, and the mark of accelerate that it needs no preparing."""
    model = build(adapters)
    before, original = logits_of(model), model.forward
    model.forward = MethodType(lambda _, *args, **kwargs: original(*args, **kwargs), model)
    Accelerator(cpu=True).prepare(model)
    reference = create_reference_model(model)
    assert vars(model).keys() - vars(reference).keys() == {"forward", "_is_accelerate_prepared"}
    train(model)
    assert torch.equal(logits_of(reference), before)


def test_a_model_with_one_expert_has_one_too() -> None:
    model: Any = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    reference, before = create_reference_model(model), logits_of(model)
    assert far(before, logits_of(llama()))
    train(model)
    assert far(logits_of(model), before)
    assert torch.equal(logits_of(reference), before)


def test_a_plain_model_has_none() -> None:
    with pytest.raises(UnsupportedOperationError, match="received: a LlamaForCausalLM"):
        create_reference_model(llama())
