"""Which layers are adapted, how they are numbered, and which are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import loramix
from loramix.errors import AdapterMismatchError, ConfigurationError, UnsupportedAdapterError
from loramix.experts.adapter import Adapter, LoraWeights
from loramix.experts.base_layers import expected_shapes
from loramix.experts.targets import new_targets
from loramix.layers.inject import adapt, find_backbones, plan
from support.tiny import ARCHITECTURES, GATED, TARGETS, build, gpt2, llama, opt, tokens

Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"


def adapter(name: str, model: nn.Module, paths: list[str], r: int = 2, **config: Any) -> Adapter:
    weights = {}
    for path in paths:
        shapes = expected_shapes(model.get_submodule(path), r)
        embedding = isinstance(model.get_submodule(path), nn.Embedding)
        weights[path] = LoraWeights(*map(torch.randn, shapes), embedding=embedding)
    return Adapter(name, loramix.LoraConfig(r=r, **config), weights)


def test_layers_are_numbered_in_the_order_of_the_models_modules() -> None:
    """Neither the order of the experts nor that of their tensors counts."""
    model = llama()
    late, early = (
        adapter("late", model, [V.format(1), Q.format(1)]),
        adapter("early", model, [V.format(0), Q.format(0)]),
    )
    for experts in ([late, early], [early, late]):
        sites = plan(model, experts)
        assert [site.path for site in sites] == [Q.format(0), V.format(0), Q.format(1), V.format(1)]
        layers = adapt(sites, [e.name for e in experts], training=(), dtype=torch.float32)
        stacks = {path: layer.stack for path, layer in layers.items()}
        assert [(path, stack.number) for path, stack in stacks.items()] == [(s.path, i) for i, s in enumerate(sites)]
        assert [s.members for s in stacks.values()] == [(experts.index(e),) for e in (early, early, late, late)]


def test_layers_have_one_layout_where_experts_ranks_and_scales_agree() -> None:
    model = llama()
    one = adapter("one", model, [Q.format(0), Q.format(1), V.format(0)], alpha_pattern={"v_proj": 3})
    two = adapter("two", model, [Q.format(0), Q.format(1)])
    layers = adapt(plan(model, [one, two]), ["one", "two"], training=(), dtype=torch.float32)
    assert [layer.stack.layout for layer in layers.values()] == [0, 1, 0]


def test_planning_and_building_leave_the_model_alone() -> None:
    model = llama()
    modules = list(model.named_modules())
    adapt(plan(model, [adapter("one", model, [Q.format(0)])]), ["one"], training=[0], dtype=torch.float32)
    assert list(model.named_modules()) == modules


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_is_every_linear_layer_but_the_head(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    paths = new_targets(model, loramix.LoraConfig(target_modules="all-linear"))
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    head = model.get_output_embeddings()
    assert paths == [p for p, m in model.named_modules() if isinstance(m, linear) and m is not head]
    assert {path.rpartition(".")[2] for path in paths} >= set(TARGETS[architecture])


@pytest.mark.parametrize("targets", [None, [], ["no_such"], "no_such"])
def test_a_new_expert_needs_modules(targets: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least one module"):
        new_targets(llama(), loramix.LoraConfig(target_modules=targets))


def test_a_module_of_another_base_is_named() -> None:
    deep = llama(num_hidden_layers=4)
    expert = adapter("deep", deep, [Q.format(i) for i in range(4)] + [V.format(i) for i in range(4)])
    with pytest.raises(AdapterMismatchError, match="and 1 more") as caught:
        plan(llama(), [expert])
    assert "'deep'" in caught.value.received
    assert Q.format(2) in caught.value.received


def test_an_expert_of_a_shallower_base_is_refused() -> None:
    model = llama()
    with pytest.raises(AdapterMismatchError, match="no tensors for it") as caught:
        plan(model, [adapter("shallow", model, [Q.format(0)], target_modules=["q_proj"])])
    assert Q.format(1) in caught.value.received


def test_a_head_that_gives_no_token_its_logits_is_refused() -> None:
    model = build(transformers.LlamaForSequenceClassification, **GATED)
    sites = plan(model, [adapter("heady", model, [Q.format(0), "score"])])
    with pytest.raises(UnsupportedAdapterError, match="after both passes") as caught:
        find_backbones(model, sites, ["heady"])
    assert "'heady'" in caught.value.received
    assert "'score'" in caught.value.received


@pytest.mark.parametrize("paths", [["lm_head", V.format(1)], ["lm_head"]])
def test_the_head_is_the_last_layer_and_its_backbone_carries_the_passes(paths: list[str]) -> None:
    model = llama()
    sites = plan(model, [adapter("heady", model, paths)])
    assert sites[-1].path == "lm_head"
    assert find_backbones(model, sites, ["heady"]) == (model.model, None)


@pytest.mark.parametrize(
    ("base", "path"),
    [
        (llama, "model.norm"),
        (opt, "model.decoder.embed_positions"),
        (gpt2, "transformer.wpe"),
    ],
)
def test_modules_of_unknown_kind_are_refused(base: Any, path: str) -> None:
    model = base()
    ones = LoraWeights(torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(UnsupportedAdapterError, match=path):
        plan(model, [Adapter("odd", loramix.LoraConfig(r=1), {path: ones})])


def test_an_expert_block_that_tokens_are_dispatched_to_is_refused() -> None:
    model = llama()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    weights = LoraWeights(torch.ones(1, 4), torch.ones(4, 1))
    path = "model.layers.0.mlp.experts.1"
    with pytest.raises(UnsupportedAdapterError, match="dispatched"):
        plan(model, [Adapter("odd", loramix.LoraConfig(r=1), {path: weights})])


def test_an_embeddings_matrices_on_a_linear_layer_are_refused() -> None:
    weights = LoraWeights(torch.ones(1, 64), torch.ones(64, 1), embedding=True)
    with pytest.raises(AdapterMismatchError, match="no embedding"):
        plan(llama(), [Adapter("odd", loramix.LoraConfig(r=1), {Q.format(0): weights})])


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 2, dilation=2), nn.Conv2d(4, 4, 1, padding_mode="reflect")]
)
def test_convolutions_of_other_kinds_are_refused(layer: nn.Conv2d) -> None:
    model = llama()
    model.model.odd = layer
    weights = LoraWeights(*map(torch.randn, expected_shapes(layer, 1)))
    with pytest.raises(UnsupportedAdapterError, match="convolution"):
        plan(model, [Adapter("odd", loramix.LoraConfig(r=1), {"model.odd": weights})])


def test_the_carrier_is_the_nearest_model_above_the_layers() -> None:
    for model, path, carrier in [
        (llama(), Q.format(0), "model"),
        (opt(), "model.decoder.layers.0.fc1", "model.decoder"),
        (gpt2(), "transformer.h.0.attn.c_attn", "transformer"),
        (llama().model, "layers.0.mlp.up_proj", ""),
    ]:
        sites = plan(model, [adapter("one", model, [path])])
        assert find_backbones(model, sites, ["one"]) == (model.get_submodule(carrier), None)


def test_a_backbone_without_a_head_is_adapted_too() -> None:
    whole, bare = llama(), llama().model
    config = loramix.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    loramix.get_peft_model(whole, config)
    torch.manual_seed(1)
    assert loramix.get_peft_model(bare, config) is bare
    assert torch.equal(bare(tokens()).last_hidden_state, whole.model(tokens()).last_hidden_state)
    with bare.disable_adapter():
        assert torch.equal(bare(tokens()).last_hidden_state, llama().model(tokens()).last_hidden_state)


def test_a_saved_embedding_tells_the_experts_base_model() -> None:
    """PEFT saves the embedding's own weight beside an expert that adapts it; rounding to bfloat16 is no difference."""
    model = llama()
    path = "model.embed_tokens"
    own = model.get_submodule(path).weight.detach()
    name = f"{path}.weight"
    for saved in (own.clone(), own.bfloat16()):
        assert plan(model, [replace(adapter("one", model, [path]), base_weights={name: saved})])
    for saved in (torch.randn_like(own), own[:-1]):
        with pytest.raises(AdapterMismatchError, match=r"'one'.*embed_tokens.*another one"):
            plan(model, [replace(adapter("one", model, [path]), base_weights={name: saved})])
