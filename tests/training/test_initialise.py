"""A router that routes before it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import support.routers  # noqa: F401 - registers kinds
from loramix import ConfigurationError, DataError, XLoraConfig, get_peft_model
from loramix.passes.state import state_of
from loramix.routers.classifier import XLoraClassifier
from loramix.routers.start import LinearRouter
from loramix.training import init_router
from loramix.training.initialise import hidden_states
from support.tiny import llama, tokens

MODES: dict[str, dict[str, Any]] = {
    "dense": {},
    "cool": {"softmax_temperature": 0.5},
    "sparse": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    "hard": {"enable_softmax": False, "top_k_lora": 2},
}


def mixture(experts: Any, **config: Any) -> Any:
    base = llama()
    torch.manual_seed(1)
    settings = {"hidden_size": 64, "adapters": experts("llama"), "xlora_depth": 2, "xlora_size": 16, **config}
    return get_peft_model(base, XLoraConfig(**settings)).eval()


class Words:
    """A tokenizer of numbers."""

    model_max_length = 10**30

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


def prompts() -> dict[str, list[str]]:
    """Each expert's texts use words of its own."""
    ranges = {"math": (4, 30), "code": (30, 60), "prose": (60, 96)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: [" ".join(map(str, torch.randint(*ends, (30,), generator=generator).tolist())) for _ in range(6)]
        for name, ends in ranges.items()
    }


def batches() -> Iterator[Mapping[str, Tensor]]:
    for number, texts in enumerate(prompts().values()):
        ids = torch.cat([Words()(text)["input_ids"] for text in texts])
        mask = torch.ones_like(ids)
        ids[0, -5:], mask[0, -5:] = 0, 0
        yield {"input_ids": ids, "attention_mask": mask, "expert_ids": torch.full((len(ids),), number)}


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_classifier_of_any_depth_computes_a_linear_map_exactly(depth: int, layerwise: bool) -> None:
    config = XLoraConfig(
        hidden_size=8, adapters={}, xlora_depth=depth, xlora_size=9, layerwise_scalings=layerwise, xlora_dropout_p=0.3
    )
    classifier = XLoraClassifier(config, n_classes=4, n_layers=3).eval()
    router = LinearRouter(torch.randn(4, 8), torch.randn(4), 2.5, 1.0)
    classifier.set_linear(router)
    hidden = torch.randn(2, 5, 8)
    expected = 2.5 * (hidden @ router.weight.T + router.bias)
    assert_close(classifier(hidden), expected.unsqueeze(2).expand(-1, -1, 3, -1), atol=1e-5, rtol=1e-5)


def test_the_units_that_are_left_over_can_still_learn() -> None:
    config = XLoraConfig(hidden_size=8, adapters={}, xlora_depth=2, xlora_size=12, xlora_dropout_p=0.0)
    classifier = XLoraClassifier(config, n_classes=3, n_layers=1)
    classifier.set_linear(LinearRouter(torch.randn(3, 8), torch.randn(3), 1.0, 1.0))
    classifier(torch.randn(1, 4, 8)).square().sum().backward()
    assert classifier.layers[-1].weight.grad[:, 6:].abs().sum() > 0


def test_too_narrow_a_router_is_refused_and_unchanged(experts: Any) -> None:
    model = mixture(experts, xlora_size=5)
    before = {name: tensor.clone() for name, tensor in model.internal_xlora_classifier.state_dict().items()}
    with pytest.raises(ConfigurationError, match="xlora_size=6"):
        init_router(model, "prompts", tokenizer=Words(), prompts=prompts())
    assert all(torch.equal(before[n], t) for n, t in model.internal_xlora_classifier.state_dict().items())


@pytest.mark.parametrize("setting", ["use_bias", "enable_relu_and_dropout"])
@pytest.mark.parametrize("method", ["zeros", "labels"])
def test_a_classifier_of_other_parts_is_refused(setting: str, method: Any, experts: Any) -> None:
    given = {"batches": batches()} if method == "labels" else {}
    with pytest.raises(ConfigurationError, match=f"{setting}=False"):
        init_router(mixture(experts, **{setting: False}), method, **given)


@pytest.mark.parametrize("mode", MODES)
def test_zeros_are_uniform(mode: str, experts: Any) -> None:
    model = mixture(experts, **MODES[mode])
    assert init_router(model, "zeros") is None
    model(tokens())
    scalings = model.get_latest_scalings()
    assert_close(scalings, torch.full_like(scalings, 0.0 if mode == "sparse" else 1 / 3))


@pytest.mark.parametrize("method", ["prompts", "labels"])
@pytest.mark.parametrize("mode", MODES)
def test_each_text_goes_to_its_expert_without_training(mode: str, method: Any, experts: Any) -> None:
    model = mixture(experts, layerwise_scalings=True, **MODES[mode])
    source = {"tokenizer": Words(), "prompts": prompts()} if method == "prompts" else {"batches": batches()}
    router = init_router(model, method, **source)
    assert router is not None
    assert router.accuracy > 0.95
    for number, texts in enumerate(prompts().values()):
        model(Words()(texts[-1])["input_ids"])
        leaders = model.get_latest_scalings().argmax(-1)
        assert (leaders == number).float().mean() > 0.9


def test_text_without_labels_gets_those_of_the_experts_that_predict_it_best(experts: Any) -> None:
    one, other = mixture(experts), mixture(experts)
    rows, best = list(batches()), []
    for batch in rows:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            losses = []
            for expert in range(3):
                with torch.no_grad(), one.fixed_scalings([float(expert == each) for each in range(3)]):
                    text = ids[mask.bool()].unsqueeze(0)
                    losses.append(float(one(text, labels=text).loss))
            best.append(losses.index(min(losses)))
    labels = torch.tensor(best).reshape(3, 6)
    assert set(best) == {0, 1, 2}
    labelled = [{**batch, "expert_ids": ids} for batch, ids in zip(rows, labels, strict=True)]
    expected = init_router(one, "labels", batches=labelled)
    unlabelled = [{n: t for n, t in batch.items() if n != "expert_ids"} for batch in rows]
    found = init_router(other, "text", batches=unlabelled)
    assert found is not None
    assert expected is not None
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("method", ["prompts", "labels", "text"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_evidence_starts_from_what_tokens_say(layerwise: bool, method: Any, experts: Any) -> None:
    config = XLoraConfig(adapters=experts("llama"), router="evidence", layerwise_scalings=layerwise)
    model = get_peft_model(llama(), config).eval()
    source = {"tokenizer": Words(), "prompts": prompts()} if method == "prompts" else {"batches": batches()}
    init_router(model, method, **source)
    led = []
    for texts in prompts().values():
        model(Words()(texts[-1])["input_ids"])
        scalings = model.get_latest_scalings()
        assert torch.equal(scalings, scalings[:, :, :1].expand_as(scalings))
        led.append(scalings.mean((0, 1, 2)).argmax())
    if method != "text":  # whose labels are the experts', not ours
        assert led == [0, 1, 2]
    init_router(model, "zeros")
    model(tokens())
    assert_close(model.get_latest_scalings(), torch.full_like(model.get_latest_scalings(), 1 / 3))


@pytest.mark.parametrize("method", ["zeros", "prompts", "labels"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_prototypes_start_where_a_classifier_starts(layerwise: bool, method: Any, experts: Any) -> None:
    source: dict[str, Any] = {"tokenizer": Words(), "prompts": prompts()} if method == "prompts" else {}
    found = []
    for kind in ({"router": "prototypes"}, {"xlora_depth": 1}):
        model = get_peft_model(
            llama(), XLoraConfig(hidden_size=64, adapters=experts("llama"), layerwise_scalings=layerwise, **kind)
        ).eval()
        init_router(model, method, **source, **({"batches": batches()} if method == "labels" else {}))
        model(tokens())
        found.append(model.get_latest_scalings())
    assert_close(*found, atol=1e-5, rtol=1e-5)


def test_a_kind_without_a_start_says_so(experts: Any) -> None:
    model = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=experts("llama"), router="test-energy"))
    with pytest.raises(ConfigurationError, match="router='test-energy', which has no start"):
        init_router(model, "zeros")


def test_regression_outputs_are_the_scalings_themselves_in_hard_routing(experts: Any) -> None:
    model = mixture(experts, **MODES["hard"])
    router = init_router(model, "labels", batches=batches())
    assert router is not None
    assert router.scale == 1.0
    model(Words()(prompts()["math"][0])["input_ids"])
    assert_close(model.get_latest_scalings().sum(-1), torch.ones(1, 30, 14), atol=0.02, rtol=0)


def test_regression_is_ridge_regression(experts: Any) -> None:
    """Against the normal equations written out over all tokens."""
    model = mixture(experts)
    router = init_router(model, "labels", batches=batches())
    h, y = [], []
    for batch in batches():
        real = batch["attention_mask"].bool()
        found = hidden_states(model, batch)[real]
        h.append(torch.cat([found, torch.ones(len(found), 1)], 1).double())
        y.append(torch.eye(3, dtype=torch.float64)[batch["expert_ids"][0]].expand(len(found), 3))
    H, Y = torch.cat(h), torch.cat(y)
    ridge = 1e-3 * (H[:, :-1].square().sum(0)).mean() * torch.eye(65, dtype=torch.float64)
    ridge[-1, -1] = 0
    expected = torch.linalg.solve(H.T @ H + ridge, H.T @ Y).T
    assert router is not None
    assert_close(torch.cat([router.weight, router.bias[:, None]], 1), expected.float(), atol=1e-4, rtol=1e-3)


def test_unknown_labels_are_left_out(experts: Any) -> None:
    one, other = mixture(experts), mixture(experts)
    extra = {"input_ids": tokens(), "expert_ids": torch.tensor([-1, -1])}
    first = init_router(one, "labels", batches=batches())
    second = init_router(other, "labels", batches=[*batches(), extra])
    assert first is not None
    assert second is not None
    assert torch.equal(first.weight, second.weight)


def test_the_model_is_left_in_its_mode_and_without_hooks(experts: Any) -> None:
    model = mixture(experts).train()
    init_router(model, "labels", batches=batches())
    assert model.training
    assert state_of(model).hooks == ()


@pytest.mark.parametrize(
    ("method", "given"),
    [("zeros", {"prompts": {}}), ("prompts", {}), ("labels", {"prompts": {}}), ("zeros", {"batches": []})],
)
def test_arguments_that_do_not_belong_together(method: Any, given: Any, experts: Any) -> None:
    with pytest.raises(ConfigurationError, match="init_router takes"):
        init_router(mixture(experts), method, **given)


def test_every_expert_needs_text(experts: Any) -> None:
    with pytest.raises(DataError, match="'prose'"):
        init_router(mixture(experts), "labels", batches=list(batches())[:2])
    with pytest.raises(DataError, match="'law'"):
        init_router(mixture(experts), "prompts", tokenizer=Words(), prompts=prompts() | {"law": ["4 5"]})
    for blank in ("", [], ["4 5", " "]):
        with pytest.raises(DataError, match="blank"):
            init_router(mixture(experts), "prompts", tokenizer=Words(), prompts={**prompts(), "math": blank})


def test_prompts_may_be_files(experts: Any, tmp_path: Path) -> None:
    texts = {name: " ".join(parts) for name, parts in prompts().items()}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    written, read = mixture(experts), mixture(experts)
    init_router(written, "prompts", tokenizer=Words(), prompts=texts)
    init_router(read, "prompts", tokenizer=Words(), prompts={name: tmp_path / f"{name}.txt" for name in texts})
    for one, other in zip(written.parameters(), read.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(DataError, match="can be read"):
        init_router(read, "prompts", tokenizer=Words(), prompts=dict.fromkeys(texts, tmp_path / "nowhere"))


@pytest.mark.parametrize("wrong", [-5, 3])
def test_a_label_that_is_no_experts_is_refused(wrong: int, experts: Any) -> None:
    first, *others = batches()
    labels = first["expert_ids"].index_fill(0, torch.tensor([1]), wrong)
    with pytest.raises(ConfigurationError, match=f"{wrong} with 3 experts"):
        init_router(mixture(experts), "labels", batches=[{**first, "expert_ids": labels}, *others])
