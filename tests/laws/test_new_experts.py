"""New experts: they change nothing at their start, train with the router beside frozen ones, and are plain LoRAs."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix import ConfigurationError, LoraConfig, PeftModel, XLoraConfig, create_reference_model, get_peft_model
from loramix.config.xlora import as_adapters
from loramix.model.peft_methods import layers_of
from loramix.model.prompt_choice import Responses
from support.mixtures import HARD, SPARSE, logits_of
from support.peft_side import PEFT_WARNINGS
from support.tiny import MOES, TARGETS, llama, save_expert, tokens

Experts = Callable[[str], dict[str, str]]


def new(rank: int = 2, **config: Any) -> LoraConfig:
    return LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS["llama"], **config})


def build(adapters: dict[str, Any], base: Any = None, **config: Any) -> Any:
    """A mixture whose experts and router are drawn with one seed."""
    base = base or llama()
    torch.manual_seed(3)
    sizes = {} if "router" in config else {"hidden_size": 64, "xlora_size": 32}
    return get_peft_model(base, XLoraConfig(adapters=adapters, task_type="CAUSAL_LM", **{**sizes, **config}))


def train(model: Any, steps: int = 3, ids: Tensor | None = None, **optimizer: Any) -> list[dict[str, Tensor]]:
    """Some steps; the gradients of each."""
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    steps_of = torch.optim.AdamW(trained.values(), **{"lr": 0.02, "weight_decay": 0.1, **optimizer})
    ids, found = tokens() if ids is None else ids, list[dict[str, Tensor]]()
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        steps_of.step()
        steps_of.zero_grad()
    model.eval()
    return found


def members(model: Any) -> dict[str, list[Tensor]]:
    """The tensors of each expert, copied."""
    found: dict[str, list[Tensor]] = {name: [] for name in model.expert_names}
    for layer in layers_of(model).values():
        for expert, weights in layer.stack.parts.items():
            found[model.expert_names[expert]] += [tensor.clone() for tensor in weights.tensors]
    return found


def test_new_experts_change_nothing_at_their_start(experts: Experts) -> None:
    expected = logits_of(llama())
    for gating in ({}, SPARSE, HARD):
        torch.testing.assert_close(logits_of(build({"a": new(), "b": new()}, **gating).eval()), expected)
    old = experts("llama")
    alone, mixed = build(dict(old)).eval(), build({"a": new(), **old, "b": new()}).eval()
    with alone.fixed_scalings([0.5, 0.3, 0.1]), mixed.fixed_scalings([0.7, 0.5, 0.3, 0.1, 0.9]):
        torch.testing.assert_close(logits_of(mixed), logits_of(alone))


def test_weights_are_chosen_by_a_prompt_for_new_experts_beside_frozen_ones(experts: Experts) -> None:
    model = build({"math": experts("llama")["math"], "e0": new()})
    train(model)
    mixed = Responses()(model, {"input_ids": tokens()})
    assert_close(mixed.sum(-1), torch.ones(2))
    assert (mixed > 0).all()


def test_new_experts_differ_and_follow_the_seed() -> None:
    one, other = (members(build({"a": new(), "b": new()})) for _ in range(2))
    assert all(torch.equal(x, y) for name in one for x, y in zip(one[name], other[name], strict=True))
    assert not torch.equal(one["a"][0], one["b"][0])


GATINGS: dict[str, dict[str, Any]] = {"dense": {}, "sparse": SPARSE, "hard": HARD}


@pytest.mark.parametrize("router", ["classifier", "prototypes", "static", "linear"])
@pytest.mark.parametrize("gating", GATINGS)
def test_a_router_of_any_kind_trains_with_new_experts_and_frozen_ones_stay(
    router: str, gating: str, experts: Experts
) -> None:
    chosen = {} if router == "classifier" else {"router": router}
    model = build({**experts("llama"), "a": new(), "b": new(3)}, **chosen, **GATINGS[gating])
    before, start = members(model), {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    train(model, ids=tokens(8, 30))
    after = members(model)
    for name in ("math", "code", "prose"):
        assert all(torch.equal(x, y) for x, y in zip(before[name], after[name], strict=True))
    moved = {n for n in ("a", "b") if all(not torch.equal(x, y) for x, y in zip(before[n], after[n], strict=True))}
    chosen_alike = router in ("static", "linear") and gating != "dense"  # at the start all tokens take the same two
    assert moved == {"a", "b"} or chosen_alike
    assert any(not torch.equal(tensor, start[name]) for name, tensor in model.router.state_dict().items())


@pytest.mark.parametrize("router", ["classifier", "prototypes", "static", "linear"])
def test_gradients_reach_every_new_expert_and_the_router_once_they_add_something(router: str) -> None:
    model = build({"a": new(), "b": new(), "c": new()}, **({} if router == "classifier" else {"router": router}))
    first, *_, last = train(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert first.keys() == last.keys() == trained
    assert all(gradient.any() == ("lora_B" in name) for name, gradient in first.items())
    for name, gradient in last.items():
        assert gradient.any(), name
    for layer in layers_of(model).values():
        for weights in layer.stack.parts.values():
            assert weights.B.any()


@pytest.mark.parametrize("router", ["arrow", "norm"])
def test_a_router_that_is_made_from_the_experts_is_refused(router: str) -> None:
    with pytest.raises(ConfigurationError, match="which do not train") as caught:
        build({"a": new()}, router=router)
    assert caught.value.received == "new experts: 'a'"


DIVIDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "v_proj"]}),
    "DoRA": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "LoRA bias": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
    "block": (MOES["qwen3_moe"], {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("case", DIVIDED)
@pytest.mark.parametrize("first", [True, False], ids=["the new one first", "the new one last"])
def test_a_new_expert_beside_a_frozen_one_computes_and_learns_as_beside_one_that_trains(
    case: str, first: bool, tmp_path: Path
) -> None:
    base, config = DIVIDED[case]
    old = {"old": save_expert(tmp_path / "old", base(), **config)}
    found = {}
    for trains in (False, True):
        one = {"new": LoraConfig(r=3, init_lora_weights=False, **config)}
        model = build({**one, **old} if first else {**old, **one}, base(), use_trainable_adapters=trains)
        assert model.peft_config["default"].use_trainable_adapters is trains
        before = members(model)
        start = logits_of(model.eval())
        train(model, 2, weight_decay=0.0)
        after = members(model)
        same = [torch.equal(x, y) for x, y in zip(before["old"], after["old"], strict=True)]
        assert not any(same) if trains else all(same)
        found[trains] = start, before["new"], after["new"]
        model.save_pretrained(tmp_path / f"saved {trains}")
    torch.testing.assert_close(found[False][0], found[True][0])
    for x, y in zip(found[False][1], found[True][1], strict=True):
        assert torch.equal(x, y)
    assert all(not torch.equal(x, y) for x, y in zip(*found[False][1:], strict=True))
    kept = load_file(tmp_path / "saved False" / "old" / "adapter_model.safetensors")
    read = load_file(tmp_path / "old" / "adapter_model.safetensors")
    assert kept.keys() == read.keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in kept.items())


def test_the_first_gradients_are_those_beside_an_expert_that_trains(experts: Experts) -> None:
    old = experts("llama")
    frozen, trained = (build({**old, "a": new()}, use_trainable_adapters=trains) for trains in (False, True))
    (some,), (every,) = train(frozen, 1), train(trained, 1)
    for path, layer in layers_of(frozen).items():
        (name, axis), columns = ("lora_B", 1), slice(-2, None)
        gradient = every[f"{path}.stacks.0.{name}"][:, columns]
        torch.testing.assert_close(some[f"{path}.stacks.0.{name}"], gradient)
        assert layer.stack.whole(name).shape[axis] == layer.stack.rank
    assert frozen.get_nb_trainable_parameters()[1] == trained.get_nb_trainable_parameters()[1]


@pytest.fixture
def mixed(experts: Experts) -> Any:
    model = build({"a": new(), **experts("llama"), "b": new(3, target_modules=["q_proj"])})
    train(model)
    return model


def test_a_mixed_mixture_can_be_copied_pickled_compared_merged_and_moved(mixed: Any) -> None:
    expected, trained = logits_of(mixed), {n for n, p in mixed.named_parameters() if p.requires_grad}
    for other in (copy.deepcopy(mixed), pickle.loads(pickle.dumps(mixed))):
        assert torch.equal(logits_of(other), expected)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == trained
    reference = create_reference_model(mixed)
    path = f"{mixed.adapted_modules[0]}.stacks.0"
    assert reference.get_submodule(path).frozen_A is mixed.get_submodule(path).frozen_A
    train(mixed)
    assert torch.equal(logits_of(reference), expected)
    low = copy.deepcopy(mixed).to(torch.bfloat16)
    assert {p.dtype for n, p in low.named_parameters() if ".stacks." in n and ".q_proj." in n} == {torch.float32}
    ids = tokens()
    mixed.fix_routing([0.2, 0.1, 0.3, 0.1, 0.3])
    fixed = mixed(ids).logits
    torch.testing.assert_close(mixed.merge_and_unload()(ids).logits, fixed, atol=1e-4, rtol=1e-4)


def test_a_layer_without_new_experts_keeps_the_base_models_dtype(experts: Experts) -> None:
    model = build({**experts("llama"), "a": new(target_modules=["q_proj"])}, llama().to(torch.bfloat16))
    dtypes = {(".q_proj." in n, p.dtype) for n, p in model.named_parameters() if ".stacks." in n}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    train(model)


def test_resizing_the_vocabulary_resizes_new_and_frozen_experts(tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head"]}
    old = save_expert(tmp_path / "old", llama(), **config)
    model = build({"old": old, "a": LoraConfig(r=2, init_lora_weights=False, **config)}).eval()
    expected = logits_of(model)
    model.resize_token_embeddings(100)
    torch.testing.assert_close(logits_of(model)[..., :96], expected)
    train(model)


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
@pytest.mark.parametrize("case", ["all new", "mixed"])
def test_each_new_expert_is_saved_as_a_lora_that_peft_loads(case: str, experts: Experts, tmp_path: Path) -> None:
    adapters: dict[str, Any] = {} if case == "all new" else dict(experts("llama"))
    adapters |= {"a": new(use_rslora=True), "b": new(3, target_modules="all-linear")}
    model = build(adapters)
    train(model)
    model.save_pretrained(tmp_path / "mixture")
    saved = json.loads((tmp_path / "mixture" / "adapter_config.json").read_text())
    assert saved["adapters"] == {name: name for name in adapters}
    assert saved["use_trainable_adapters"] == (case == "all new")
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path / "mixture")
    assert torch.equal(logits_of(loaded), logits_of(model))
    for name in ("a", "b"):
        with model.fixed_scalings([float(name == other) for other in adapters]):
            expected = logits_of(model)
        alone = peft.PeftModel.from_pretrained(llama(), tmp_path / "mixture" / name)
        torch.testing.assert_close(alone(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, logits_of(llama()), atol=1e-3)
    going_on = PeftModel.from_pretrained(llama(), tmp_path / "mixture", is_trainable=True)
    names = [name for name, parameter in going_on.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in names) == (case == "all new")


def test_configurations_with_new_experts(tmp_path: Path, experts: Experts) -> None:
    config = XLoraConfig(hidden_size=64, adapters={"a": peft.LoraConfig(r=4, target_modules=["q_proj"]), "b": "user/b"})
    assert list(config.new_experts) == ["a"]
    assert isinstance(config.new_experts["a"], LoraConfig)
    assert config.new_experts["a"].target_modules == {"q_proj"}
    written = config.to_dict()["adapters"]
    assert (written["a"]["r"], written["b"]) == (4, "user/b")
    with pytest.raises(ConfigurationError, match="get_peft_model"):
        config.save_pretrained(tmp_path)
    given = XLoraConfig(hidden_size=64, adapters={"a": new()})
    model = get_peft_model(llama(), given)
    assert isinstance(given.adapters["a"], LoraConfig)
    assert given.adapters["a"].base_model_name_or_path is None
    assert model.peft_config["default"].to_dict()["adapters"] == {"a": "a"}
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ConfigurationError, match="experts that exist"):
        PeftModel.from_pretrained(llama(), tmp_path / "mixture", config=given)
    with pytest.raises(ConfigurationError, match="experts that exist"):
        as_adapters({"a": new()})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["nowhere"]}, "'a'.*nowhere"),
        ({"target_modules": None}, "'a'.*target_modules=None"),
        ({"modules_to_save": ["lm_head"]}, "'a'.*modules_to_save"),
        ({"init_lora_weights": "pissa"}, "'a'.*pissa"),
    ],
)
def test_what_no_new_expert_can_be_is_refused_by_name_and_leaves_the_base_model(
    config: dict[str, Any], said: str, experts: Experts
) -> None:
    base = llama()
    with pytest.raises(loramix.errors.LoramixError, match=said):
        build({**experts("llama"), "a": new(**config)}, base)
    assert not isinstance(base, PeftModel)
    with pytest.raises(ConfigurationError, match="r=0"):
        new(0)
    with pytest.raises(ConfigurationError, match="or to a LoraConfig"):
        XLoraConfig(hidden_size=64, adapters={"a": {"r": 8}})  # pyright: ignore[reportArgumentType]
