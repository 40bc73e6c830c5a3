"""A router of another package that reads each layer's low-rank activation: the one-pass forward and what it owes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix import ConfigurationError, PeftModel, XLoraConfig, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.analysis import record_routing
from loramix.layers.slot import current
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import attach
from loramix.routers import Gating, register_gating
from support.convolution import tiny_convolution
from support.routers import EnergyRouter, Seen
from support.tiny import ARCHITECTURES, llama, save_expert, tokens

Experts = Callable[[str], dict[str, str]]
KINDS = ["llama", "gpt2", "opt"]


def mixture(folders: Mapping[str, str], base: Any = None, **config: Any) -> Any:
    settings = XLoraConfig(adapters=dict(folders), router=EnergyRouter.kind, **config)
    return get_peft_model(base or llama(), settings).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    return model(tokens() if ids is None else ids, **inputs).logits


@pytest.mark.parametrize("gating", [{}, {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 1}])
def test_each_layer_mixes_by_the_scalings_that_it_made(gating: dict[str, Any], experts: Experts) -> None:
    model, hook = mixture(experts("llama"), **gating), Seen()
    attach(model, hook)
    inner = {}
    for path in model.adapted_modules:
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda m, args, out, path=path: inner.update({path: (args[0], out)}))
    logits(model)
    (output,) = hook.outputs
    assert output.final.shape == (2, 9, len(model.adapted_modules), 3)
    assert output.final.std(0).max() > 1e-3
    for number, path in enumerate(model.adapted_modules):
        x, y = inner[path]
        layer = model.get_submodule(path)
        delta = torch.zeros_like(y)
        for expert, weights in layer.stack.unstack(dict(layer.stack.named_parameters())).items():
            scale = layer.stack.rank_scale[layer.stack.expert_of_rank == expert][0]
            delta += output.final[:, :, number, expert, None] * scale * (x @ weights.A.T @ weights.B.T)
        assert_close(layer.base_layer(x) + delta, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", KINDS)
def test_cached_equals_uncached_with_the_base_models_cache(architecture: str, experts: Experts) -> None:
    model = mixture(experts(architecture), ARCHITECTURES[architecture]())
    with torch.no_grad():
        first = model(tokens()[:, :5], use_cache=True)
        assert not isinstance(first.past_key_values, loramix.TwoPassCache)
        rest = model(tokens()[:, 5:], past_key_values=first.past_key_values).logits
    assert_close(rest, logits(model)[:, 5:], atol=1e-5, rtol=1e-5)
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **greedy), model.generate(tokens(), use_cache=False, **greedy))


@pytest.mark.parametrize("architecture", KINDS)
def test_checkpointed_gradients_are_the_same(architecture: str, experts: Experts) -> None:
    class Loss(RoutingHook):
        def routed(self, output: RouterOutput) -> Tensor:
            return output.logits.square().mean()

    found = []
    for checkpointing in (False, True):
        model = mixture(experts(architecture), ARCHITECTURES[architecture](), use_trainable_adapters=True)
        attach(model, Loss())
        if checkpointing:
            enable_checkpointing(model)
        torch.manual_seed(5)
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert "internal_xlora_router.scale" in plain
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert plain["internal_xlora_router.scale"].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("targets", "settings"),
    [(["q_proj"], {"use_dora": True}), (["embed_tokens", "v_proj"], {}), (["down_proj"], {"lora_bias": True})],
    ids=["DoRA", "embedding", "LoRA bias"],
)
def test_a_lone_expert_at_weight_one_is_that_expert(targets: list[str], settings: Any, tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "one", llama(), target_modules=targets, **settings)
    alone: Any = PeftModel.from_pretrained(llama(), folder)
    assert_close(logits(mixture({"one": folder})), logits(alone), atol=1e-5, rtol=1e-5)


def test_convolutions_make_their_scalings_by_position(tmp_path: Path) -> None:
    folders = {
        name: save_expert(tmp_path / name, tiny_convolution(), seed=i, target_modules=["conv"], task_type=None)
        for i, name in enumerate(("a", "b"))
    }
    model, hook = mixture(folders, tiny_convolution()), Seen()
    attach(model, hook)
    whole = logits(model)
    assert hook.outputs[0].final.isfinite().all()
    with model.disable_adapter():
        assert not torch.allclose(logits(model), whole)


def test_global_weight_and_settings_take_effect_at_the_next_forward(experts: Experts) -> None:
    model = mixture(experts("llama"))
    before = logits(model)
    model.set_global_scaling_weight(0.0)
    with model.disable_adapter():
        plain = logits(model)
    assert_close(logits(model), plain)
    model.set_global_scaling_weight(1.0)
    model.set_topk_lora(1)
    assert not torch.allclose(logits(model), before)


def test_bfloat16_routes_in_float32(experts: Experts) -> None:
    model = mixture(experts("llama")).to(torch.bfloat16)
    assert model.router.scale.dtype == torch.float32
    exact = mixture(experts("llama"))
    logits(model), logits(exact)
    assert_close(model.get_latest_scalings(), exact.get_latest_scalings(), atol=0.05, rtol=0.05)


def test_a_saved_kind_comes_back_and_one_that_is_not_registered_is_named(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    with torch.no_grad():
        model.router.scale.mul_(3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["router"]) == ("LORAMIX", "test-energy")
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "router": "another-package"}))
    base = llama()
    with pytest.raises(ConfigurationError, match=r"router='another-package'[\s\S]*import the package that registers"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not isinstance(base, PeftModel)


def test_a_gating_of_another_package(experts: Experts) -> None:
    class Capped(Gating):
        def select(self, activated: Float[Tensor, "*tokens L E"]) -> Float[Tensor, "*tokens L E"]:
            return super().select(activated).clamp(max=0.3)

    register_gating("test-capped", Capped)
    register_gating("test-capped", Capped)  # twice is once
    with pytest.raises(ConfigurationError, match="a name of its own"):
        register_gating("test-capped", Gating)
    model, hook = mixture(experts("llama"), gating="test-capped"), Seen()
    attach(model, hook)
    logits(model)
    (output,) = hook.outputs
    assert torch.equal(output.final, output.activated.clamp(max=0.3))
    assert (output.activated > 0.3).any()


@dataclass(frozen=True)
class Limited(Gating):
    limit: float = 1.0

    def select(self, activated: Float[Tensor, "*tokens L E"]) -> Float[Tensor, "*tokens L E"]:
        return super().select(activated).clamp(max=self.limit)


register_gating("test-limited", Limited)


def test_a_gating_with_settings_of_its_own(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"), gating="test-limited", gating_settings={"limit": 0.25})
    assert final_of(model, tokens()[:1]).max() == 0.25
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(mixture(experts("llama"), gating="test-limited")), logits(model))


@pytest.mark.parametrize(
    ("gating", "settings", "said"),
    [("test-limited", {"limit": 0.25, "floor": 0.1}, "correct floor"), ("xlora", {"top_k": 1}, "correct top_k")],
)
def test_an_unknown_setting_of_a_gating_is_named(
    gating: str, settings: dict[str, Any], said: str, experts: Experts
) -> None:
    base = llama()
    with pytest.raises(ConfigurationError, match=said):
        mixture(experts("llama"), base, gating=gating, gating_settings=settings)
    assert not isinstance(base, PeftModel)


def test_no_pass_is_under_way_afterwards(experts: Experts) -> None:
    logits(mixture(experts("llama")))
    with pytest.raises(loramix.RoutingError, match="only inside the passes"):
        current()


def final_of(model: Any, ids: Tensor) -> Tensor:
    """(S, L, E): the final scalings of one forward over one text."""
    hook = Seen()
    detach = attach(model, hook)
    logits(model, ids)
    detach()
    return hook.outputs[0].final[0]


@pytest.mark.parametrize("cached", [True, False])
def test_a_record_of_what_was_generated_is_that_of_one_forward(cached: bool, experts: Experts) -> None:
    model = mixture(experts("llama"))
    with record_routing(model) as record:
        text = model.generate(tokens(2), max_new_tokens=6, do_sample=False, use_cache=cached)
    for row in range(2):
        part = record.part[record.part.sequence == row]
        assert part.token.tolist() == text[row, :-1].tolist()
        assert part.position.tolist() == list(range(text.shape[1] - 1))
        assert_close(part.scalings, final_of(model, text[row : row + 1, :-1]), atol=1e-5, rtol=1e-5)


def test_a_record_goes_on_with_a_cache_that_was_filled_before(experts: Experts) -> None:
    model, ids = mixture(experts("llama")), tokens(1)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with record_routing(model) as record:
            model(ids[:, 4:7], past_key_values=cache)
            model(ids[:, 7:], past_key_values=cache)
    assert record.part.token.tolist() == ids[0, 4:].tolist()
    assert record.part.position.tolist() == list(range(4, 9))
    assert_close(record.part.scalings, final_of(model, ids)[4:], atol=1e-5, rtol=1e-5)
