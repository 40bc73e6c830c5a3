"""The static router, and with it the one-pass forward: one weight for each expert, the same for every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GenerationConfig

import loramix
from loramix import (
    ConfigurationError,
    PeftModel,
    RoutingError,
    UnsupportedOperationError,
    XLoraConfig,
    get_peft_model,
)
from loramix._compat import enable_checkpointing
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import attach
from loramix.routers import StaticRouter
from loramix.training import ScalingPassCache, init_router
from support.tiny import ARCHITECTURES, llama, tokens
from support.versions import needs_transformers

Experts = Callable[[str], dict[str, str]]
WEIGHTS = [0.7, -0.4, 0.2]


def static(experts: Experts, architecture: str = "llama", **config: Any) -> Any:
    settings = XLoraConfig(adapters=experts(architecture), router="static", **config)
    return get_peft_model(ARCHITECTURES[architecture](), settings).eval()


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    return model(tokens(), **inputs).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_given_scalings_are_those_of_fixed_scalings(architecture: str, experts: Experts) -> None:
    model = static(experts, architecture, enable_softmax=False)
    model.router.assign(WEIGHTS)
    found = logits(model)
    with model.fixed_scalings(WEIGHTS):
        assert torch.equal(logits(model), found)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), found)


def test_each_layer_has_its_own_where_they_are_layerwise(experts: Experts) -> None:
    model = static(experts, layerwise_scalings=True, enable_softmax=False)
    rows = torch.randn(len(model.adapted_modules), 3)
    model.router.assign(rows)
    found = logits(model)
    with model.fixed_scalings(rows):
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    "gating",
    [{}, {"softmax_temperature": 0.3}, {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}],
    ids=["dense", "cold", "sparse"],
)
def test_logits_pass_the_gating_as_any_routers_do(gating: dict[str, Any], layerwise: bool, experts: Experts) -> None:
    model = static(experts, layerwise_scalings=layerwise, **gating)
    model.router.assign(WEIGHTS)
    found = logits(model)
    z = torch.tensor(WEIGHTS)
    if "top_k_lora" in gating:
        expected = torch.tensor([z[0].exp(), 0.0, z[2].exp()]) / (z[0].exp() + z[2].exp())
    else:
        expected = torch.softmax(z / gating.get("softmax_temperature", 1.0), -1)
    with model.fixed_scalings(expected):
        assert_close(logits(model), found)


@pytest.mark.parametrize("enable_softmax", [True, False])
def test_it_starts_at_the_uniform_mixture(enable_softmax: bool, experts: Experts) -> None:
    model = static(experts, enable_softmax=enable_softmax)
    found = logits(model)
    with model.fixed_scalings([1 / 3] * 3):
        assert_close(logits(model), found)


def test_all_mass_on_one_expert_is_that_expert(experts: Experts) -> None:
    model = static(experts, enable_softmax=False)
    model.router.assign([0.0, 1.0, 0.0])
    alone = PeftModel.from_pretrained(llama(), experts("llama")["code"])
    assert_close(logits(model), logits(alone), atol=1e-5, rtol=1e-5)


def test_permuting_experts_permutes_their_weights(experts: Experts) -> None:
    folders = experts("llama")
    model = static(experts)
    model.router.assign(WEIGHTS)
    order = [2, 0, 1]
    names = list(folders)
    other: Any = get_peft_model(
        llama(), XLoraConfig(adapters={names[i]: folders[names[i]] for i in order}, router="static")
    ).eval()
    other.router.assign([WEIGHTS[i] for i in order])
    assert_close(logits(other), logits(model), atol=1e-5, rtol=1e-5)


def test_it_makes_one_pass_with_the_base_models_own_cache(experts: Experts) -> None:
    model = static(experts)
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        out = model(tokens(), use_cache=True)
        assert len(calls) == 1
        assert not isinstance(out.past_key_values, loramix.TwoPassCache)
        cut = model(tokens()[:, :5], use_cache=True)
        rest = model(tokens()[:, 5:], past_key_values=cut.past_key_values)
    assert_close(rest.logits, out.logits[:, 5:], atol=1e-5, rtol=1e-5)
    assert torch.equal(
        model.generate(tokens(), max_new_tokens=6), model.generate(tokens(), max_new_tokens=6, use_cache=False)
    )


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_latest_scalings_the_log_and_the_hooks_see_what_was_made(layerwise: bool, experts: Experts) -> None:
    class Seen(RoutingHook):
        output: RouterOutput | None = None

        def routed(self, output: RouterOutput) -> None:
            self.output = output

    model = static(experts, layerwise_scalings=layerwise, top_k_lora=2)
    model.router.assign(WEIGHTS)
    hook = Seen()
    detach = attach(model, hook)
    model.enable_scalings_logging()
    logits(model)
    detach()
    layers, expected = len(model.adapted_modules), torch.softmax(torch.tensor(WEIGHTS), -1)
    latest = model.get_latest_scalings()
    assert latest.shape == (2, 9, layers, 3)
    assert_close(latest, expected.expand_as(latest))
    assert torch.equal(model.get_scalings_log()[0], latest)
    assert hook.output is not None
    assert hook.output.final.shape == (2, 9, layers if layerwise else 1, 3)
    assert (hook.output.final == 0).sum(-1).eq(1).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_and_losses_of_hooks_join(checkpointing: bool, experts: Experts) -> None:
    class Loss(RoutingHook):
        def routed(self, output: RouterOutput) -> Tensor:
            return output.logits.square().mean()

    def gradient(*hooks: RoutingHook) -> Tensor:
        model = static(experts, layerwise_scalings=True)
        model.router.assign(WEIGHTS)
        if checkpointing:
            enable_checkpointing(model)
        for hook in hooks:
            attach(model, hook)
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["internal_xlora_router.logits"]
        return model.router.logits.grad

    plain = gradient()
    assert (plain != 0).any()
    numbers = plain.numel()
    expected = plain + 2 * torch.tensor(WEIGHTS).expand_as(plain) / numbers
    assert_close(gradient(Loss()), expected, atol=1e-6, rtol=1e-5)


def test_what_was_saved_is_loaded(experts: Experts, tmp_path: Path) -> None:
    model = static(experts, layerwise_scalings=True)
    model.router.assign(torch.randn(len(model.adapted_modules), 3))
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    assert isinstance(loaded.router, StaticRouter)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.unload() is not None
    assert not hasattr(loaded, "internal_xlora_router")


def test_it_merges_once_its_routing_is_fixed(experts: Experts) -> None:
    model = static(experts, enable_softmax=False)
    model.router.assign(WEIGHTS)
    expected = logits(model)
    model.fix_routing(WEIGHTS)
    assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def test_lockstep_has_no_effect_and_says_so(experts: Experts) -> None:
    model = static(experts)
    with pytest.warns(UserWarning, match="one pass"):
        found = model.generate(tokens(), max_new_tokens=4, lockstep=True)
    assert torch.equal(found, model.generate(tokens(), max_new_tokens=4))
    assert model.lockstep_report.reason is not None


@pytest.mark.parametrize("values", [[0.1, 0.2], [[0.1, 0.2, 0.3]] * 2, [float("nan"), 0.0, 0.0], "math"])
def test_weights_of_another_shape_are_refused(values: Any, experts: Experts) -> None:
    model = static(experts)
    before = model.router.logits.clone()
    with pytest.raises(RoutingError, match="one finite logit for each expert"):
        model.router.assign(values)
    assert torch.equal(model.router.logits, before)


def test_settings_that_mean_nothing_are_refused(experts: Experts) -> None:
    base = llama()
    with pytest.raises(ConfigurationError, match="scaling_pass_value belongs to a scaling pass"):
        get_peft_model(base, XLoraConfig(adapters=experts("llama"), router="static", scaling_pass_value=0.5))
    with pytest.raises(ConfigurationError, match=r"router must be one of .*'classifier', .*'static'"):
        get_peft_model(base, XLoraConfig(adapters=experts("llama"), router="arow"))
    with pytest.raises(ConfigurationError, match="gating must be one of 'xlora'"):
        get_peft_model(base, XLoraConfig(adapters=experts("llama"), hidden_size=64, gating="sparsemax"))
    assert not isinstance(base, PeftModel)


def test_what_needs_a_scaling_pass_or_the_classifier_says_so(experts: Experts) -> None:
    model = static(experts)
    with pytest.raises(UnsupportedOperationError, match="router='static', which needs none"):
        ScalingPassCache(model, max_bytes=2**20)
    with pytest.raises(ConfigurationError, match="which prompts do not tell"):
        init_router(model, "prompts", tokenizer=object(), prompts={})
    with pytest.raises(UnsupportedOperationError, match="after=3"):
        model.fix_routing(after=3)
    assert model.fixed_routing is None


def test_it_starts_from_the_shares_of_labelled_text(experts: Experts) -> None:
    batches = [
        {"input_ids": tokens()[:1], "expert_ids": torch.tensor([0])},
        {"input_ids": tokens()[:, :3], "expert_ids": torch.tensor([1, 2])},
    ]
    for gating in ({}, {"softmax_temperature": 0.5}, {"enable_softmax": False}):
        model = static(experts, **gating)
        init_router(model, "labels", batches=batches)
        logits(model)
        assert_close(model.get_latest_scalings()[0, 0, 0], torch.tensor([9.0, 3.0, 3.0]) / 15)
        init_router(model, "zeros")
        logits(model)
        assert_close(model.get_latest_scalings()[0, 0, 0], torch.full((3,), 1 / 3))


@needs_transformers(5, 17, "continuous batching writes other tokens than generate, without experts too")
def test_continuous_batching_pages_its_one_cache(experts: Experts) -> None:
    model = static(experts)
    model.router.assign(WEIGHTS)
    ids = [tokens(1)[0].tolist(), tokens(1, length=5, seed=2)[0].tolist()]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = model.generate_batch(ids, generation_config=settings)
    for row, answer in zip(ids, found.values(), strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=4, do_sample=False)[0, len(row) :]
        assert answer.generated_tokens == alone.tolist()
