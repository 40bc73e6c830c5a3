"""The laws of routers (docs/semantics.md §6), for each registered kind and for one of each family from outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix import PeftModel, TwoPassCache, XLoraConfig, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.analysis import record_routing
from loramix.formats import describe
from loramix.layers.slot import current
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import attach
from loramix.routers import Router, RouterSizes, router_kinds
from support.routers import EnergyRouter, PlainRouter, Seen
from support.tiny import llama, save_expert, tokens

Experts = Callable[[str], dict[str, str]]
KINDS = {kind.kind: kind for kind in (*router_kinds(), PlainRouter, EnergyRouter)}
LAYERWISE = [False, True]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_router = pytest.mark.parametrize(("kind", "layerwise"), [(k, each) for k in KINDS for each in LAYERWISE])


def mixture(folders: Mapping[str, str], kind: str, *, layerwise: bool = True, **config: Any) -> Any:
    """A mixture whose router is far from its start."""
    settings = XLoraConfig(hidden_size=64, adapters=dict(folders), router=kind, layerwise_scalings=layerwise, **config)
    model: Any = get_peft_model(llama(), settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    return model(tokens() if ids is None else ids, **inputs).logits


def reorder(router: Any, order: list[int]) -> None:
    """Give the router's experts another order. A new kind of router says here how."""
    experts, ranks = len(order), (2, 3, 4)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, experts))[:, order].flatten(0, 1)

    def columns(tensor: Tensor) -> Tensor:
        parts = tensor.unflatten(1, (-1, sum(ranks))).split(ranks, dim=2)
        return torch.cat([parts[i] for i in order], dim=2).flatten(1)[order]

    with torch.no_grad():
        if router.kind == "classifier":
            for parameter in router.layers[-1].parameters():
                parameter.copy_(rows(parameter))
        elif router.kind == "static":
            router.logits.copy_(router.logits[:, order])
        elif router.kind == "prototypes" or router.kind == "evidence":
            for name, parameter in router.named_parameters():
                if name in ("weight", "bias", "prior"):
                    parameter.copy_(rows(parameter))
        elif router.kind == "linear":
            router.weight.copy_(columns(router.weight))
            router.bias.copy_(router.bias[:, order])
        elif router.kind == "arrow":
            router.directions.copy_(columns(router.directions))
        elif router.kind == "norm":
            for tensor in (router.mean, router.deviation, router.factors):
                tensor.copy_(tensor[:, order])
        elif router.kind == "test-plain":
            router.weight.copy_(router.weight[:, order])
        elif router.kind == "test-energy":
            router.scale.copy_(router.scale[order])
        else:
            pytest.fail(f"how the experts of a {router.kind!r} router are reordered is not said")


def test_all_kinds_are_here() -> None:
    kinds = {"classifier", "prototypes", "evidence", "static", "linear", "arrow", "norm", "test-plain", "test-energy"}
    assert kinds <= KINDS.keys()


@every_router
def test_permuting_the_experts_permutes_the_scalings(kind: str, layerwise: bool, experts: Experts) -> None:
    folders, order = experts("llama"), [2, 0, 1]
    names = list(folders)
    one = mixture(folders, kind, layerwise=layerwise)
    other = mixture({names[i]: folders[names[i]] for i in order}, kind, layerwise=layerwise)
    other.router.load_state_dict(one.router.state_dict())
    reorder(other.router, order)
    assert_close(logits(other), logits(one), atol=1e-5, rtol=1e-5)
    assert_close(other.get_latest_scalings(), one.get_latest_scalings()[..., order], atol=1e-5, rtol=1e-5)
    assert one.get_latest_scalings().std(-1).max() > 1e-2


@every_kind
def test_the_passes_are_those_of_its_family(kind: str, experts: Experts) -> None:
    model, read = mixture(experts("llama"), kind), []
    layer = model.get_submodule(model.adapted_modules[0])
    layer.register_forward_hook(lambda *call: read.append(current().reads_low_rank))
    logits(model)
    assert (
        read
        == {
            "hidden state": [False, False],
            "input embeddings": [False],
            "low-rank activation": [True],
            "nothing": [False],  # and so, on a GPU, two launches a layer
        }[KINDS[kind].reads]
    )


@every_router
def test_cached_equals_uncached(kind: str, layerwise: bool, experts: Experts) -> None:
    model = mixture(experts("llama"), kind, layerwise=layerwise)
    with torch.no_grad():
        first = model(tokens()[:, :5], use_cache=True)
        rest = model(tokens()[:, 5:], past_key_values=first.past_key_values).logits
    assert isinstance(first.past_key_values, TwoPassCache) == (KINDS[kind].reads == "hidden state")
    assert_close(rest, logits(model)[:, 5:], atol=1e-5, rtol=1e-5)


@every_kind
def test_generation_gives_the_tokens_of_computing_everything_again(kind: str, experts: Experts) -> None:
    model = mixture(experts("llama"), kind)
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0  # left-padded
    for settings in ({"do_sample": False}, {"num_beams": 2}):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=5, **settings)
        assert torch.equal(
            found, model.generate(ids, attention_mask=mask, max_new_tokens=5, use_cache=False, **settings)
        )
    alone = model.generate(ids[1:, 3:], max_new_tokens=5, do_sample=False)
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(padded[1, 9:], alone[0, 6:])


@every_router
def test_a_saved_router_comes_back_bit_by_bit(kind: str, layerwise: bool, experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"), kind, layerwise=layerwise)
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    assert type(loaded.router) is KINDS[kind]
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@every_router
def test_its_shapes_are_those_of_its_tensors(kind: str, layerwise: bool, experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"), kind, layerwise=layerwise)
    layers = [model.get_submodule(path).stack for path in model.adapted_modules]
    ranks = tuple(tuple(stack.expert_of_rank.tolist()) for stack in layers)
    router: Router = model.router
    shapes = router.shapes(model.active_peft_config, RouterSizes(64, len(layers), 3, ranks))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()}
    model.save_pretrained(tmp_path)
    told = describe(tmp_path).router
    assert told is not None
    assert told.layerwise == (layerwise or KINDS[kind].reads == "low-rank activation")
    assert (told.kind, told.parameters) == (kind, sum(tensor.numel() for tensor in router.state_dict().values()))


class _Loss(RoutingHook):
    def routed(self, output: RouterOutput) -> Tensor:
        return output.logits.square().mean()


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.trains])
def test_checkpointed_gradients_are_the_same(kind: str, experts: Experts) -> None:
    found = []
    for checkpointing in (False, True):
        model = mixture(experts("llama"), kind, use_trainable_adapters=True, **depth(kind))
        attach(model, _Loss())
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    own = {name for name in plain if name.startswith(KINDS[kind].attribute)}
    assert len(own) == len(list(model.router.parameters()))
    assert max(plain[name].abs().max() for name in own) > 1e-4
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def depth(kind: str) -> dict[str, Any]:
    """Without dropout, two runs are the same."""
    return {"xlora_dropout_p": 0.0} if kind == "classifier" else {}


@every_router
def test_hooks_log_and_latest_scalings_see_the_same(kind: str, layerwise: bool, experts: Experts) -> None:
    model, seen = mixture(experts("llama"), kind, layerwise=layerwise, top_k_lora=2), Seen()
    attach(model, seen)
    model.enable_scalings_logging()
    logits(model)
    (output,), L = seen.outputs, len(model.adapted_modules)
    whole = output.activated.expand(-1, -1, L, -1)
    assert_close(model.get_latest_scalings(), whole)
    assert_close(model.get_scalings_log()[0], whole)
    assert_close(output.activated, torch.softmax(output.logits, -1))
    assert ((output.final > 0).sum(-1) == 2).all()


@every_kind
def test_a_record_holds_the_scalings_of_each_token(kind: str, experts: Experts) -> None:
    model, seen = mixture(experts("llama"), kind), Seen()
    attach(model, seen)
    with record_routing(model) as record:
        logits(model)
    assert record.part.token.tolist() == tokens().flatten().tolist()
    final = seen.outputs[0].final.flatten(0, 1)
    assert_close(record.part.scalings, final.expand(-1, record.part.scalings.shape[1], -1), atol=1e-6, rtol=1e-6)


@every_kind
def test_a_router_keeps_float32(kind: str, experts: Experts) -> None:
    model = mixture(experts("llama"), kind).to(torch.bfloat16)
    assert {tensor.dtype for tensor in model.router.state_dict().values()} == {torch.float32}
    assert logits(model).isfinite().all()


@every_kind
def test_without_weight_and_without_adapters_it_is_the_base_model(kind: str, experts: Experts) -> None:
    model, base = mixture(experts("llama"), kind), logits(llama())
    whole = logits(model)
    assert not torch.allclose(whole, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_global_scaling_weight(0.0)
    assert_close(logits(model), base, atol=1e-6, rtol=1e-6)


@every_kind
def test_rows_do_not_depend_on_each_other(kind: str, experts: Experts) -> None:
    model = mixture(experts("llama"), kind)
    both = logits(model)
    for row in range(2):
        assert_close(logits(model, tokens()[row : row + 1]), both[row : row + 1], atol=1e-5, rtol=1e-5)


@every_kind
def test_fixed_scalings_take_its_place(kind: str, experts: Experts) -> None:
    model = mixture(experts("llama"), kind)
    with model.fixed_scalings([0.0, 1.0, 0.0]):
        alone = logits(model)
    code: Any = loramix.PeftModel.from_pretrained(llama(), experts("llama")["code"])
    assert_close(alone, logits(code), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.reads == "low-rank activation"])
@pytest.mark.parametrize("regular", [True, False], ids=["equal ranks", "other ranks"])
def test_the_logits_of_a_pass_are_those_of_each_layer(
    kind: str, regular: bool, experts: Experts, tmp_path: Path
) -> None:
    same = {
        name: save_expert(tmp_path / name, llama(), seed=i, target_modules=["q_proj"]) for i, name in enumerate("ab")
    }
    router = mixture(same if regular else experts("llama"), kind).router
    found = router.for_pass()
    layers = [8, 8] if regular else [9] * 14
    for layer, ranks in enumerate(layers):
        for low_rank in (torch.randn(2, 5, ranks), 1e-4 * torch.randn(3, ranks)):
            assert_close(found(layer, low_rank), router.layer_logits(layer, low_rank), atol=1e-5, rtol=1e-5)
