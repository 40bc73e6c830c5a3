"""The table: what each row means, and that its figures are those of the text."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from loramix import ConfigurationError, DataError, XLoraConfig, get_peft_model
from loramix.evaluation.ablation import without_expert
from loramix.evaluation.losses import token_nats
from loramix.evaluation.passages import Passage, cut_passages, window_size, windows
from loramix.evaluation.scores import BASE, MIXTURE, ORACLE, UNIFORM, Score, columns, evaluate, measure, total
from support.byte_tokenizer import byte_tokenizer
from support.tiny import llama, tokens

TEXTS = [("1 + 2 = 3", "math"), ("def f(x): # é 😀", "code")]


def mixture(experts: Any, **config: Any) -> Any:
    base = llama(vocab_size=257)
    torch.manual_seed(1)
    return get_peft_model(base, XLoraConfig(hidden_size=64, adapters=experts, layerwise_scalings=True, **config)).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from support.tiny import save_expert

    root, base = tmp_path_factory.mktemp("experts"), llama(vocab_size=257)
    names = {name: save_expert(root / name, base, seed=i, target_modules=["q_proj"]) for i, name in enumerate("abc")}
    return mixture(names)


class Uniform(torch.nn.Module):
    """A language model that knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 257))


def test_a_passages_bytes_are_its_texts() -> None:
    for window in (5, 9, 100):
        passages = list(cut_passages(byte_tokenizer(), TEXTS, window=window))
        for text, group in TEXTS:
            sizes = [size for p in passages for g, size in zip(p.groups, p.bytes, strict=True) if g == group]
            assert sum(sizes) == len(text.encode())
        assert all(len(p.ids) <= window and p.ids[0] == 0 and len(p.groups) == len(p.ids) - 1 for p in passages)


@pytest.mark.parametrize(("size", "start", "overlap"), [(4, [], 0), (4, [0], 0), (4, [], 1), (2, [], 1), (9, [0], 0)])
def test_windows_hold_each_token_of_a_text_once_beside_the_overlap(size: int, start: list[int], overlap: int) -> None:
    for count in range(10):
        found = list(windows(list(range(10, 10 + count)), size, start=start, overlap=overlap))
        pieces = [window.ids[len(start) :] for window in found]
        assert all(window.ids[: len(start)] == start and len(window.ids) <= size for window in found)
        assert all(window.first + 10 == piece[0] for window, piece in zip(found, pieces, strict=True))
        whole = [token for i, piece in enumerate(pieces) for token in piece[overlap if i else 0 :]]
        assert whole == (list(range(10, 10 + count)) if count > overlap else [])


def test_a_window_fits_the_base_model() -> None:
    config = llama().config
    assert (window_size(config), window_size(config, 7)) == (128, 7)
    for wrong in (1, 129):
        with pytest.raises(DataError, match="128 positions"):
            window_size(config, wrong)
    with pytest.raises(ConfigurationError):
        window_size(config, True)


def test_passages_are_limited_by_group() -> None:
    passages = list(cut_passages(byte_tokenizer(), [("x" * 100, "a"), ("y" * 100, "b")], window=11, limit=3))
    assert [p.groups[0] for p in passages] == ["a"] * 3 + ["b"] * 3


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="not a fast one"):
        list(cut_passages(SimpleNamespace(is_fast=False, bos_token_id=0), TEXTS, window=8))


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary() -> None:
    scores = measure(Uniform(), list(cut_passages(byte_tokenizer(), TEXTS, window=64)))
    for text, group in TEXTS:
        size = len(text.encode())
        assert scores[group].loss == pytest.approx(math.log(257))
        assert scores[group].perplexity == pytest.approx(257)
        assert scores[group].bits_per_byte == pytest.approx(math.log2(257))
        assert (scores[group].tokens, scores[group].bytes) == (size, size)


def test_nats_of_a_known_distribution() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1.0, 1.0, 1.0]]]).log()
    assert_close(token_nats(logits, torch.tensor([[0, 1, 2]])), torch.tensor([[4.0, 8.0]]).log())


def test_the_batch_does_not_change_the_score(model: Any) -> None:
    passages = list(cut_passages(byte_tokenizer(), TEXTS * 3, window=7))
    one, many = measure(model, passages, batch=1), measure(model, passages, batch=8)
    for group, score in one.items():
        assert many[group].nats == pytest.approx(score.nats, rel=1e-5)


def test_scores_add_like_texts() -> None:
    together = Score(2.0, 1, 4) + Score(4.0, 2, 8)
    assert (together.loss, together.bytes) == (2.0, 12)
    assert total([]) == Score()


def test_each_row_is_what_it_says(model: Any) -> None:
    passages = [Passage(row, ["x"] * 8, [1] * 8) for row in tokens(2, 9).tolist()]
    found = evaluate(model, passages).scores
    with model.fixed_scalings([0.0, 1.0, 0.0]):
        assert found["b"]["x"].nats == pytest.approx(measure(model, passages)["x"].nats)
    with model.disable_adapter():
        assert found[BASE]["x"].nats == pytest.approx(measure(model, passages)["x"].nats)
    assert found[MIXTURE]["x"].nats == pytest.approx(measure(model, passages)["x"].nats)
    assert len({round(row["x"].nats, 4) for row in found.values()}) == len(found) == 9
    assert list(found) == [BASE, "a", "b", "c", UNIFORM, MIXTURE, "without a", "without b", "without c"]


def test_the_oracle_is_never_worse_than_an_expert(model: Any) -> None:
    passages = list(cut_passages(byte_tokenizer(), TEXTS, window=64))
    found = evaluate(model, passages, leave_one_out=False)
    for group, score in found.row(ORACLE).items():
        assert score.nats == min(found.scores[name][group].nats for name in "abc")
        assert found.best_expert(group) in "abc"
    table = columns(found, "loss")
    assert table[ORACLE]["all"] <= min(table[name]["all"] for name in "abc")
    assert found.leave_one_out() == {}


MODES: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    "hard": {"enable_softmax": False, "top_k_lora": 2},
    "hard, all": {"enable_softmax": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_without_an_expert_its_weight_is_zero(mode: str, model: Any) -> None:
    config = model.peft_config["default"]
    before = dict(vars(config))
    vars(config).update(MODES[mode])
    try:
        output: list[torch.Tensor] = []
        with without_expert(model, "b"):
            from loramix.passes.hooks import RoutingHook
            from loramix.passes.state import attach

            class See(RoutingHook):
                def routed(self, found: Any) -> None:
                    output.append(found.final)

            detach = attach(model, See())
            logits = model(tokens()).logits
            detach()
        assert torch.isfinite(logits).all()
        assert not output[0][..., 1].any()
        assert output[0][..., [0, 2]].any()
    finally:
        vars(config).clear()
        vars(config).update(before)


def test_leaving_out_an_expert_that_helps_costs(model: Any) -> None:
    passages = [Passage(row, ["x"] * 8, [1] * 8) for row in tokens(2, 9).tolist()]
    found = evaluate(model, passages)
    whole = found.scores[MIXTURE]["x"].loss
    for name in "abc":
        assert found.leave_one_out()[name] == pytest.approx(found.scores[f"without {name}"]["x"].loss - whole)
    document = found.to_dict()
    assert document["rows"][MIXTURE]["all"]["loss"] == pytest.approx(whole)
    assert set(document["leave_one_out"]) == set("abc")


def test_nothing_to_predict_is_an_error(model: Any) -> None:
    with pytest.raises(DataError, match="at least two tokens"):
        evaluate(model, [])
