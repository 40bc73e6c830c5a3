"""Forward and backward equal a mixture written down as the paper has it; checkpointing changes no gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from loramix._compat import CHECKPOINTING, enable_checkpointing
from loramix.errors import ConfigurationError
from loramix.formats import load_adapter
from loramix.layers.functional import lora_mixture_reference
from loramix.layers.layer import XLoraLayer
from support.mixtures import HARD, SPARSE, mixture
from support.tiny import ARCHITECTURES, llama, tokens

Experts = Callable[[str], dict[str, str]]
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


class PlainLayer(nn.Module):
    """One expert after the other, with the scalings set from outside."""

    def __init__(self, base: nn.Module, experts: list[tuple[nn.Parameter, nn.Parameter, float]]) -> None:
        super().__init__()
        self.base, self.experts, self.scalings = base, experts, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        scalings = self.scalings.expand(*x.shape[:2], len(self.experts))
        return self.base(x) + lora_mixture_reference(x, self.experts, scalings)


class PlainMixture:
    """Two passes of a Llama with `PlainLayer`s."""

    def __init__(self, model: Any, folders: dict[str, str]) -> None:
        self.base, self.config = llama().requires_grad_(False), model.internal_xlora_classifier.config
        adapters = [load_adapter(name, folder) for name, folder in folders.items()]
        self.layers: dict[str, PlainLayer] = {}
        for path in model.adapted_modules:
            parts = [
                (nn.Parameter(a.weights[path].A), nn.Parameter(a.weights[path].B), a.scaling(path)) for a in adapters
            ]
            self.layers[path] = PlainLayer(self.base.get_submodule(path), parts)
            self.base.set_submodule(path, self.layers[path])
        first, _, last = (
            layer for layer in model.internal_xlora_classifier.layers if not isinstance(layer, nn.Dropout)
        )
        self.router = [p.detach().clone().requires_grad_() for p in (*first.parameters(), *last.parameters())]

    def __call__(self, ids: Tensor) -> Tensor:
        for layer in self.layers.values():
            layer.scalings = torch.tensor(self.config.scaling_pass_value)
        with torch.no_grad():
            hidden = self.base.model(ids).last_hidden_state
        W1, b1, W2, b2 = self.router
        z = torch.relu(hidden @ W1.T + b1) @ W2.T + b2
        z = z.unflatten(-1, (len(self.layers), 3)) if self.config.layerwise_scalings else z.unsqueeze(2)
        s = self.gate(z).expand(-1, -1, len(self.layers), -1)
        for number, layer in enumerate(self.layers.values()):
            layer.scalings = s[:, :, number]
        return self.base(ids).logits

    def gate(self, z: Tensor) -> Tensor:
        config = self.config
        s = torch.softmax(z / config.softmax_temperature, -1) if config.enable_softmax else z
        if config.top_k_lora is None:
            return s
        dropped = s < s.topk(config.top_k_lora).values[..., -1:]
        if config.enable_softmax_topk:
            return torch.softmax(s.masked_fill(dropped, -torch.inf), -1)
        return s.masked_fill(dropped, 0.0)


@pytest.mark.parametrize("layerwise", [False, True], ids=["shared", "layerwise"])
@pytest.mark.parametrize(
    "gating", [{"softmax_temperature": 0.7, "scaling_pass_value": 0.3}, SPARSE, HARD], ids=["dense", "sparse", "hard"]
)
def test_logits_and_gradients_equal_the_written_down_mixture(
    layerwise: bool, gating: dict[str, Any], experts: Experts
) -> None:
    settings = {"layerwise_scalings": layerwise, "xlora_depth": 2, "xlora_dropout_p": 0.0, **gating}
    model = mixture(experts("llama"), use_trainable_adapters=True, **settings)
    plain = PlainMixture(model, experts("llama"))
    logits, expected = model(tokens()).logits, plain(tokens())
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    loss_of(logits).backward()
    loss_of(expected).backward()
    for parameter, other in zip(model.internal_xlora_classifier.parameters(), plain.router, strict=True):
        assert other.grad.abs().max() > 1e-4
        assert_close(parameter.grad, other.grad, **TOLERANCE)
    for path, layer in plain.layers.items():
        ours = model.get_submodule(path)
        got = ours.stack.unstack({"lora_A": ours.stack.lora_A.grad, "lora_B": ours.stack.lora_B.grad})
        for e, (A, B, _) in enumerate(layer.experts):
            assert_close(got[e].A, A.grad, **TOLERANCE)
            assert_close(got[e].B, B.grad, **TOLERANCE)
        assert any(A.grad.abs().max() > 1e-5 and B.grad.abs().max() > 1e-5 for A, B, _ in layer.experts)


def test_frozen_experts_give_the_router_the_same_gradients(experts: Experts) -> None:
    frozen, trained = (mixture(experts("llama"), use_trainable_adapters=trains) for trains in (False, True))
    for model in (frozen, trained):
        loss_of(model(tokens()).logits).backward()
    assert_close(router_gradients(frozen), router_gradients(trained), atol=1e-6, rtol=1e-5)


def kept_for_backward(call: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward, the parameters aside."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("layerwise", [False, True], ids=["shared", "layerwise"])
def test_backward_keeps_the_low_rank_activation_of_a_layer_and_computes_nothing_for_frozen_weights(
    layerwise: bool, experts: Experts
) -> None:
    ids = tokens(4, 32)
    base = llama().requires_grad_(False)
    embedded = base.get_input_embeddings()(ids).requires_grad_()
    model = mixture(experts("llama"), layerwise_scalings=layerwise, xlora_depth=1)
    own = kept_for_backward(lambda: base(inputs_embeds=embedded, labels=ids, use_cache=False).loss)
    mixed = kept_for_backward(lambda: model(ids, labels=ids).loss)
    layers = [layer for layer in model.modules() if isinstance(layer, XLoraLayer)]
    ranks = sum(layer.stack.rank for layer in layers)
    columns = ranks if layerwise else layers[0].stack.rank
    made = len(model.expert_names) * (len(layers) if layerwise else 1)
    assert mixed - own <= 4 * ids.numel() * (ranks + columns + 2 * made + 64)  # 64: the router's input
    model(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"internal_xlora_classifier.{name}" for name, _ in model.internal_xlora_classifier.named_parameters()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_recomputes_and_gives_equal_gradients(architecture: str, experts: Experts) -> None:
    stored, checkpointed = (trained_mixture(experts, architecture) for _ in range(2))
    enable_checkpointing(checkpointed)
    calls = [count_calls(model) for model in (stored, checkpointed)]
    for model in (stored, checkpointed):
        loss_of(model(tokens()).logits).backward()
    assert [len(each) for each in calls] == [2, 3]
    assert_gradients_equal(checkpointed, stored)


def test_two_forwards_before_one_backward_recompute_each_with_its_own_routing(experts: Experts) -> None:
    stored, checkpointed = (trained_mixture(experts) for _ in range(2))
    enable_checkpointing(checkpointed)
    for model in (stored, checkpointed):
        first, second = (loss_of(model(tokens(seed=seed)).logits) for seed in (1, 5))
        (first + 2 * second).backward()
    assert_gradients_equal(checkpointed, stored)


def test_a_backward_in_another_thread_recomputes_with_the_routing_of_the_forward(experts: Experts) -> None:
    stored, checkpointed = (trained_mixture(experts) for _ in range(2))
    enable_checkpointing(checkpointed)
    for model in (stored, checkpointed):
        loss = loss_of(model(tokens()).logits)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert_gradients_equal(checkpointed, stored)


def test_checkpointing_under_fixed_scalings_survives_the_end_of_their_context(experts: Experts) -> None:
    stored, checkpointed = (trained_mixture(experts) for _ in range(2))
    enable_checkpointing(checkpointed)
    for model in (stored, checkpointed):
        with model.fixed_scalings([0.2, 0.3, 0.5]):
            loss = loss_of(model(tokens()).logits)
        loss.backward()
    assert_gradients_equal(checkpointed, stored, router=False)


def test_checkpointing_can_be_switched_on_before_the_mixture_is_built(experts: Experts) -> None:
    """As `prepare_model_for_kbit_training` does."""
    base = llama()
    enable_checkpointing(base)
    early = trained_mixture(experts, base=base)
    stored = trained_mixture(experts)
    for model in (stored, early):
        loss_of(model(tokens()).logits).backward()
    assert_gradients_equal(early, stored)


def test_a_base_model_with_reentrant_checkpointing_is_refused(experts: Experts) -> None:
    base = llama()
    enable_checkpointing(base, use_reentrant=True)
    with pytest.raises(ConfigurationError, match="use_reentrant"):
        mixture(experts("llama"), base=base)
    assert type(base) is type(llama())


def test_reentrant_checkpointing_is_refused(experts: Experts) -> None:
    model = trained_mixture(experts)
    with pytest.raises(ConfigurationError, match="use_reentrant"):
        enable_checkpointing(model, use_reentrant=True)
    enable_checkpointing(model, use_reentrant=False)
    getattr(model, f"{CHECKPOINTING}_disable")()
    calls = count_calls(model)
    loss_of(model(tokens()).logits).backward()
    assert len(calls) == 2


def trained_mixture(experts: Experts, architecture: str = "llama", base: Any = None) -> Any:
    """In train mode, everything trainable, nothing random."""
    base = base or ARCHITECTURES[architecture](**({"dropout": 0.0} if architecture == "opt" else {}))
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    settings = {"layerwise_scalings": True, "xlora_dropout_p": 0.0, "scaling_pass_value": 0.2}
    return mixture(experts(architecture), base=base, use_trainable_adapters=True, **settings).train()


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens(seed=2).flatten())


def count_calls(model: Any) -> list[None]:
    calls: list[None] = []
    model.get_submodule(model.adapted_modules[0]).register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def router_gradients(model: Any) -> list[Tensor]:
    return [parameter.grad for parameter in model.internal_xlora_classifier.parameters()]


def assert_gradients_equal(one: Any, other: Any, router: bool = True) -> None:
    gradients = [{name: p.grad for name, p in m.named_parameters() if p.requires_grad} for m in (one, other)]
    assert len(gradients[1]) > 4
    for name, expected in gradients[1].items():
        if router or "classifier" not in name:
            assert expected.abs().max() > 1e-7, name
            assert_close(gradients[0][name], expected, atol=1e-6, rtol=1e-5)
