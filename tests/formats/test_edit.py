"""Edits of a mixture as data: exact to the bit, and what cannot be edited."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from loramix import (
    AdapterMismatchError,
    AdapterNameError,
    ConfigurationError,
    LoramixError,
    UnsupportedOperationError,
    XLoraConfig,
)
from loramix.formats import (
    MixtureCheckpoint,
    add_expert,
    load_mixture,
    remove_expert,
    rename_expert,
    reorder_experts,
    replace_expert,
    save_mixture,
)
from loramix.routers import LayerRouter, RouterSizes, gating_of, router_class
from support.checkpoints import HIDDEN, make_expert, same_expert, same_tensors

NAMES = ["math", "code", "prose", "law"]
OTHER_LAYERS = ("model.layers.1.q", "model.layers.2.q")


def made(experts: int = 3, seed: int = 0, **config: Any) -> MixtureCheckpoint:
    members = [make_expert(name, seed=seed + i, r=1 + i) for i, name in enumerate(NAMES[:experts])]
    given = {"hidden_size": HIDDEN, "adapters": {name: f"user/{name}" for name in NAMES[:experts]}}
    settings = XLoraConfig(**given | config)
    generator = torch.Generator().manual_seed(seed)
    shapes = MixtureCheckpoint(settings, {}, members).router_shapes() or {}
    router = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return MixtureCheckpoint(settings, router, members)


def logits(mixture: MixtureCheckpoint) -> torch.Tensor:
    """(tokens, L or 1, E), of a few hidden states."""
    sizes = RouterSizes(HIDDEN, mixture.num_layers, len(mixture.experts))
    router: Any = router_class(mixture.config).build(mixture.config, sizes)
    router.load(mixture.router)
    if mixture.config.router == "static":
        return router.constant_logits()[None].detach()
    return router.eval().distinct(torch.randn(1, 7, HIDDEN, generator=torch.Generator().manual_seed(1)))[0].detach()


def same(one: MixtureCheckpoint, two: MixtureCheckpoint) -> bool:
    return (
        one.config == two.config
        and list(one.config.adapters) == list(two.config.adapters)
        and same_tensors(one.router, two.router)
        and [expert.name for expert in one.experts] == [expert.name for expert in two.experts]
        and all(map(same_expert, one.experts, two.experts))
    )


mixtures = st.one_of(
    st.fixed_dictionaries(
        {
            "experts": st.integers(2, 4),
            "seed": st.integers(0, 2**16),
            "layerwise_scalings": st.booleans(),
            "xlora_depth": st.integers(1, 3),
            "xlora_size": st.integers(1, 9),
            "softmax_temperature": st.floats(0.1, 10),
        }
    ),
    st.fixed_dictionaries(
        {
            "experts": st.integers(2, 4),
            "seed": st.integers(0, 2**16),
            "router": st.just("static"),
            "layerwise_scalings": st.booleans(),
        }
    ),
)
few = settings(max_examples=40)


@few
@given(mixtures, st.randoms())
def test_an_order_and_back_is_where_it_was(drawn: dict[str, Any], random: Any) -> None:
    start = made(**drawn)
    names = list(start.config.adapters)
    order = random.sample(names, len(names))
    turned = reorder_experts(start, order)
    assert list(turned.config.adapters) == [expert.name for expert in turned.experts] == order
    assert_close(logits(turned), logits(start)[..., [names.index(name) for name in order]])
    assert same(reorder_experts(turned, names), start)


@few
@given(mixtures, st.integers(0, 3))
def test_what_was_added_and_removed_was_never_there(drawn: dict[str, Any], seed: int) -> None:
    start = made(**drawn)
    before = copy.deepcopy(start)
    larger = add_expert(start, make_expert("new", seed=seed, r=3))
    assert same(remove_expert(larger, "new"), start)
    assert same(start, before)  # the functions are pure
    assert_close(logits(larger)[..., :-1], logits(start))
    scalings = gating_of(larger.config).activate(logits(larger))
    assert scalings[..., -1].max() < 3e-9
    assert_close(scalings[..., :-1], gating_of(start.config).activate(logits(start)))


@few
@given(mixtures, st.data())
def test_the_others_stay_as_they_are(drawn: dict[str, Any], data: st.DataObject) -> None:
    start = made(**drawn)
    names = list(start.config.adapters)
    gone = data.draw(st.sampled_from(names))
    smaller = remove_expert(start, gone)
    kept = [name for name in names if name != gone]
    assert list(smaller.config.adapters) == kept
    assert_close(logits(smaller), logits(start)[..., [names.index(name) for name in kept]])
    assert all(map(same_expert, smaller.experts, (e for e in start.experts if e.name != gone)))


@few
@given(mixtures, st.data())
def test_another_name_is_that_alone(drawn: dict[str, Any], data: st.DataObject) -> None:
    start = made(**drawn)
    old = data.draw(st.sampled_from(list(start.config.adapters)))
    renamed = rename_expert(start, old, "new")
    assert [expert.name for expert in renamed.experts] == list(renamed.config.adapters)
    assert same_tensors(renamed.router, start.router)
    assert renamed.config.adapters["new"] == start.config.adapters[old]
    assert same(rename_expert(renamed, "new", old), start)


@few
@given(mixtures, st.data())
def test_a_column_is_what_was_given(drawn: dict[str, Any], data: st.DataObject) -> None:
    start = made(**drawn)
    place = data.draw(st.integers(0, len(start.experts) - 1))
    name = start.experts[place].name
    columns = remaining(start, place)
    turned = reorder_experts(
        add_expert(remove_expert(start, name), start.experts[place], columns), list(start.config.adapters)
    )
    assert same_tensors(turned.router, start.router)
    replaced = replace_expert(start, start.experts[0].name, make_expert("any", seed=5), columns)
    assert torch.equal(logits(replaced)[..., 0], logits(start)[..., place]) or place != 0
    assert replaced.experts[0].name == start.experts[0].name


def remaining(mixture: MixtureCheckpoint, place: int) -> dict[str, torch.Tensor]:
    """One expert's part of each tensor, written out for the two kinds."""
    experts = len(mixture.experts)
    if mixture.config.router == "static":
        return {"logits": mixture.router["logits"][:, place]}
    last = f"layers.{max(int(name.split('.')[1]) for name in mixture.router)}"
    found = {name: tensor for name, tensor in mixture.router.items() if name.startswith(last)}
    parts = {name: tensor.unflatten(0, (-1, experts))[:, place] for name, tensor in found.items()}
    return parts if mixture.config.layerwise_scalings else {name: part[0] for name, part in parts.items()}


def test_given_scalings_go_with_the_experts() -> None:
    start = made(elsewhere={"tower": {"math": 1.0, "code": 0.5}, "head": "uniform"})
    assert rename_expert(start, "math", "sums").config.elsewhere["tower"] == {"sums": 1.0, "code": 0.5}
    smaller = remove_expert(start, "math").config
    assert smaller.elsewhere == {"tower": {"code": 0.5}, "head": "uniform"}
    assert smaller.scalings_elsewhere("tower.q") == [0.5, 0.0]


def test_top_k_keeps_all_that_are_left() -> None:
    assert remove_expert(made(top_k_lora=3), "math").config.top_k_lora == 2
    assert remove_expert(made(top_k_lora=2), "math").config.top_k_lora == 2
    assert add_expert(made(top_k_lora=3), make_expert("new")).config.top_k_lora == 3


def test_an_edited_mixture_is_saved_and_read(tmp_path: Any) -> None:
    start = made(layerwise_scalings=True)
    edited = reorder_experts(
        add_expert(rename_expert(start, "code", "python"), make_expert("new")), ["new", "prose", "math", "python"]
    )
    save_mixture(tmp_path, edited.config, edited.router, edited.experts)
    read = load_mixture(tmp_path)
    assert list(read.config.adapters) == ["new", "prose", "math", "python"]
    assert read.config.adapters["python"] == "user/code"
    assert same_tensors(read.router, edited.router)


class TestRefused:
    NEW: ClassVar[Any] = make_expert("new")

    @pytest.mark.parametrize(
        ("edit", "error", "said"),
        [
            (lambda m: remove_expert(m, "x"), AdapterNameError, r"'x', and experts 'math', 'code', 'prose'"),
            (lambda m: replace_expert(m, "x", make_expert("new")), AdapterNameError, "'x'"),
            (lambda m: rename_expert(m, "x", "y"), AdapterNameError, "'x'"),
            (lambda m: rename_expert(m, "math", "Code"), AdapterNameError, "'Code'"),
            (lambda m: rename_expert(m, "math", "a/b"), AdapterNameError, "'a/b'"),
            (lambda m: add_expert(m, make_expert("math")), AdapterNameError, "'math' and 'math'"),
            (lambda m: add_expert(m, make_expert("..")), AdapterNameError, "another folder"),
            (lambda m: reorder_experts(m, ["math", "code"]), AdapterNameError, "name them all"),
            (
                lambda m: reorder_experts(m, ["math", "code", "code"]),
                AdapterNameError,
                "each expert of the mixture once",
            ),
            (lambda m: add_expert(m, make_expert("new"), {}), ConfigurationError, r"layers.0.weight.*\(16,\)"),
            (
                lambda m: add_expert(
                    m,
                    make_expert("new"),
                    {"layers.0.weight": torch.zeros(HIDDEN), "layers.0.bias": torch.tensor(-torch.inf)},
                ),
                ConfigurationError,
                "with infinite ones",
            ),
        ],
    )
    def test_names_and_columns(self, edit: Any, error: type[LoramixError], said: str) -> None:
        with pytest.raises(error, match=said):
            edit(made())

    def test_the_last_expert(self) -> None:
        with pytest.raises(ConfigurationError, match="at least one expert"):
            remove_expert(made(1), "math")

    def test_an_expert_of_another_base_model(self) -> None:
        other = make_expert("new")
        for part in other.weights.values():
            part.A = torch.zeros(2, 2 * HIDDEN)
        for edit in (lambda: add_expert(made(), other), lambda: replace_expert(made(), "code", other)):
            with pytest.raises(AdapterMismatchError, match=r"model.layers.0.q'[\s\S]*\(32, 16\)[\s\S]*user/base"):
                edit()
        assert len(replace_expert(made(1), "math", other).experts) == 1  # nothing to compare with

    @pytest.mark.parametrize("router", ["classifier", "static"])
    def test_other_layers_with_scalings_for_each_layer(self, router: str) -> None:
        other = make_expert("new", modules=OTHER_LAYERS)
        assert add_expert(made(router=router), other).num_layers == 3
        layerwise = made(router=router, layerwise_scalings=True)
        with pytest.raises(AdapterMismatchError, match=r"'new', with which 1 layers[\s\S]*model.layers.2.q"):
            add_expert(layerwise, other)
        alone = made(1, router=router, layerwise_scalings=True)
        with pytest.raises(AdapterMismatchError, match=r"'math', with which 2 layers"):
            replace_expert(alone, "math", other)
        wide = made(2, router=router)
        wide.experts[1].weights["model.layers.2.q"] = other.weights["model.layers.2.q"]
        assert remove_expert(wide, "code").num_layers == 2
        layerwise = made(2, router=router, layerwise_scalings=True)
        layerwise.experts[1].weights["model.layers.2.q"] = other.weights["model.layers.2.q"]
        with pytest.raises(AdapterMismatchError, match=r"'code', with which 1 layers"):
            remove_expert(layerwise, "code")

    def test_cold_experts_where_none_can_be(self) -> None:
        with pytest.warns(UserWarning, match="performs worse"):
            twice = made(enable_softmax_topk=True, top_k_lora=3)
        twice.config.top_k_lora = None
        with pytest.raises(ConfigurationError, match="every expert has one"):
            add_expert(twice, self.NEW)
        with pytest.raises(UnsupportedOperationError, match="use_bias=False"):
            add_expert(made(use_bias=False), self.NEW)
        assert len(add_expert(made(use_bias=False, enable_softmax=False), self.NEW).experts) == 4

    def test_a_router_that_reads_all_experts_is_fitted_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("loramix.formats.edit.router_class", lambda _: Together)
        mixture = made()
        for edit in (
            lambda: remove_expert(mixture, "math"),
            lambda: add_expert(mixture, self.NEW),
            lambda: reorder_experts(mixture, ["code", "math", "prose"]),
        ):
            with pytest.raises(
                UnsupportedOperationError, match=r"'test-together'[\s\S]*'weight'[\s\S]*train its router"
            ):
                edit()
        assert list(rename_expert(mixture, "math", "sums").config.adapters) == ["sums", "code", "prose"]


class Together(LayerRouter):
    """z = W h: reads the activations of all experts."""

    kind = "test-together"

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Any:
        raise NotImplementedError

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> dict[str, tuple[int, ...]]:
        return {"weight": (sizes.experts, sum(map(len, sizes.expert_of_rank)))}

    def layer_logits(self, layer: int, low_rank: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
