"""Laws of what is said of layers, of two records, and of labels; and what an expert is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from loramix import ConfigurationError, DataError, RoutingError, UnsupportedOperationError
from loramix.analysis import agreement, confusion, drift, record_routing
from loramix.analysis.metrics import entropy_of
from loramix.evaluation import leave_one_out
from loramix.passes.state import state_of
from support.records import random_record, record_of
from support.tiny import tokens


def test_a_layer_agrees_with_itself_and_permuting_permutes() -> None:
    record = random_record(40, layers=5, experts=3)
    found = agreement(record)
    assert_close(found.diagonal(), torch.ones(5))
    assert torch.equal(found, found.T)
    leading = record.scalings.argmax(-1)
    for one in range(5):
        for other in range(5):
            assert float(found[one, other]) == pytest.approx(
                float((leading[:, one] == leading[:, other]).float().mean())
            )
    order = [3, 0, 4, 1, 2]
    assert_close(agreement(record.select(layers=order)), found[order][:, order])
    assert_close(agreement(record.select(experts=[2, 0, 1])), found)
    assert_close(agreement(random_record(40, layers=5, experts=3, parts=4)), found)


def test_shared_scalings_and_empty_records_do_not_agree_or_differ() -> None:
    with pytest.raises(RoutingError, match="they always agree"):
        agreement(random_record(layers=1, shared=True))
    for call in (agreement, lambda record: drift(record, record), lambda record: confusion(record, [])):
        with pytest.raises(RoutingError, match="recorded tokens"):
            call(random_record(0, texts=[0]))


def test_drift_of_a_record_with_itself_is_nothing_and_with_the_opposite_all() -> None:
    record = random_record(texts=[5, 7])
    found = drift(record, record)
    assert found.mean_divergence == pytest.approx(0, abs=1e-6)
    assert list(found.importance.values()) == pytest.approx([0, 0, 0])
    one = record_of(torch.eye(3)[[0, 1, 2]][:, None])
    other = record_of(torch.eye(3)[[1, 2, 0]][:, None])
    assert_close(drift(one, other).divergence, torch.ones(3))


def test_drift_goes_by_the_names_of_experts_and_layers() -> None:
    one, other = random_record(seed=1), random_record(seed=2)
    turned = drift(one, other.select(experts=["e2", "e0", "e1"], layers=[3, 1, 0, 2]))
    assert turned.by_layer == pytest.approx(drift(one, other).by_layer)
    assert_close(turned.divergence, drift(one, other).divergence)
    assert turned.importance == pytest.approx(drift(one, other).importance)


def test_drift_is_what_its_equation_says() -> None:
    one, other = random_record(seed=1), random_record(seed=2)
    found, back = drift(one, other), drift(other, one)
    p, q = one.scalings.double(), other.scalings.double()
    m = (p + q) / 2
    kl = [(a * (a / m).log2()).sum(-1) for a in (p, q)]
    assert_close(found.divergence, ((kl[0] + kl[1]) / 2).mean(1).float())
    assert_close(found.divergence, back.divergence)
    assert list(found.by_layer) == one.layers
    assert sum(found.by_layer.values()) / 4 == pytest.approx(found.mean_divergence)
    assert found.importance == pytest.approx({name: -value for name, value in back.importance.items()})
    assert sum(found.importance.values()) == pytest.approx(0, abs=1e-6)
    order = [2, 0, 1]
    permuted = drift(one.select(experts=order), other.select(experts=order))
    assert permuted.importance == pytest.approx(found.importance)
    assert_close(permuted.divergence, found.divergence)


def test_records_of_other_mixtures_or_other_tokens_are_refused() -> None:
    record = random_record()
    for other, what in (
        (random_record(experts=4), "same experts and layers"),
        (random_record(layers=2), "same experts and layers"),
        (random_record(layers=1, shared=True), "same experts and layers"),
        (random_record(11), "the same tokens"),
        (random_record(tokens=[5] * 12), "the same tokens"),
        (random_record(texts=[6, 6]), "the same tokens"),
    ):
        with pytest.raises(RoutingError, match=what):
            drift(record, other)


def test_confusion_counts_leading_experts_by_label() -> None:
    scalings = torch.eye(3)[[0, 0, 1, 2, 1, 1]][:, None]
    record = record_of(scalings, experts=["math", "code", "prose"], texts=[3, 3])
    found = confusion(record, ["math", "math", "math", "prose", "other", None])
    assert found.labels == ["math", "other", "prose"]
    assert found.counts.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert found.accuracy == pytest.approx(3 / 4)
    assert_close(found.shares.sum(1), torch.ones(3))
    by_text = confusion(record, {0: "math", 1: "code"})
    assert by_text.counts.tolist() == [[0, 2, 1], [2, 1, 0]]
    assert confusion(record, ["x"] * 6).accuracy is None
    assert confusion(record, ["math", float("nan"), None, *"abc"]).labels == ["a", "b", "c", "math"]
    order = [2, 0, 1]
    permuted = confusion(record.select(experts=order), {0: "math", 1: "code"})
    assert permuted.counts.tolist() == by_text.counts[:, order].tolist()
    for labels in ([], ["math"] * 5, [None] * 6, [float("nan")] * 6, {7: "math"}):
        with pytest.raises(RoutingError, match="one label for each recorded token"):
            confusion(record, labels)


def test_labels_that_are_numbers_are_in_their_order() -> None:
    record = random_record(12)
    assert confusion(record, [*range(11), "a"]).labels == [*map(str, range(11)), "a"]
    for wrong in (torch.zeros(11), "abcdefghijkl"):
        with pytest.raises(RoutingError, match="one label for each recorded token"):
            confusion(record, wrong)


def test_labels_may_be_a_tensor_an_array_or_a_column_of_a_table() -> None:
    import pandas

    record = record_of(torch.eye(3)[[0, 0, 1]][:, None], experts=["0", "1", "2"])
    for labels in (torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]).numpy(), pandas.Series([0, 1, 1])):
        found = confusion(record, labels)
        assert (found.labels, found.accuracy) == (["0", "1"], pytest.approx(2 / 3))
    for missing in (pandas.NA, pandas.NaT, None, float("nan")):
        column = pandas.Series(["0", missing, "1"], dtype=object)
        assert confusion(record, column).tokens.tolist() == [1, 1]
        assert confusion(record, {0: "a", 7: missing}).labels == ["a"]
    assert confusion(record, pandas.array(["0", None, "1"], dtype="string")).accuracy == 1


def test_no_expert_leads_where_no_selected_expert_has_a_scaling() -> None:
    record = record_of(torch.eye(4)[[0, 0, 0, 3, 3, 3]][:, None].expand(6, 2, 4))
    some = record.select(experts=["e1", "e3"])
    found = confusion(some, {0: "text"})
    assert (found.counts.tolist(), found.tokens.tolist(), found.shares.tolist()) == ([[0, 3]], [6], [[0, 0.5]])
    assert confusion(some, ["e1", "e1", "e3", "e3", "e3", None]).accuracy == pytest.approx(2 / 5)
    assert confusion(some, ["e1", *[None] * 5]).accuracy == 0
    assert some.leading.tolist() == [-1, -1, -1, 1, 1, 1]
    assert_close(agreement(some), torch.ones(2, 2))


def test_metrics_of_a_record_are_those_of_its_layers() -> None:
    record = random_record(30, parts=3)
    whole, layers = record.metrics(), record.metrics_by_layer()
    assert list(layers) == record.layers
    for name in ("load", "importance"):
        mean = torch.tensor([getattr(metrics, name) for metrics in layers.values()]).mean(0)
        assert getattr(whole, name) == pytest.approx(mean.tolist(), abs=1e-6)
    assert whole.mean_entropy == pytest.approx(float(entropy_of(record.scalings).mean()), abs=1e-6)
    assert whole.mean_entropy == pytest.approx(sum(m.mean_entropy for m in layers.values()) / 4, abs=1e-6)


def test_entropy_is_one_where_all_are_alike_and_nothing_where_one_has_all() -> None:
    assert_close(entropy_of(torch.full((2, 5), 0.2)), torch.ones(2))
    assert_close(entropy_of(torch.eye(4)), torch.zeros(4))
    assert_close(entropy_of(torch.ones(3, 1)), torch.zeros(3))


@torch.no_grad()
def test_leaving_an_expert_out_is_the_loss_without_it(shared: Any) -> None:
    texts = [tokens(1, 9, seed=1)[0].tolist(), tokens(1, 5, seed=2)[0].tolist(), [7]]
    found = leave_one_out(shared, texts, batch=2)
    assert found.tokens == 8 + 4
    assert list(found.without) == ["math", "code", "prose"]

    def loss() -> float:
        nats = 0.0
        for text in texts[:2]:
            ids = torch.tensor([text])
            nats += float(nn.functional.cross_entropy(shared(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        return nats / 12

    assert found.loss == pytest.approx(loss(), rel=1e-5)

    def by_token() -> torch.Tensor:
        several = [torch.tensor([text]) for text in texts[:2]]
        return torch.cat(
            [nn.functional.cross_entropy(shared(i).logits[0, :-1], i[0, 1:], reduction="none") for i in several]
        )

    with_all = by_token()
    bias = shared.internal_xlora_classifier.layers[-1].bias
    before = bias.clone()
    bias[1] = -torch.inf
    without = loss()
    spread = (by_token() - with_all).var(correction=0).div(12).sqrt()
    bias.copy_(before)
    assert found.without["code"] == pytest.approx(without, rel=1e-5)
    assert found.differences["code"] == pytest.approx(without - loss(), abs=1e-5)
    assert found.errors["code"] == pytest.approx(float(spread), rel=1e-3)
    assert state_of(shared).hooks == ()
    with pytest.raises(DataError, match="at least two tokens"):
        leave_one_out(shared, [[3]])
    for wrong in ([1_000_000, 5], [-1, 5], [1.5, 2.5], "def f", 5, torch.ones(2, 2, dtype=torch.long), [True, True]):
        with pytest.raises(DataError, match="a list of token ids"):
            leave_one_out(shared, [wrong])
    with pytest.raises(ConfigurationError, match="batch"):
        leave_one_out(shared, texts, batch=0)
    with pytest.raises(UnsupportedOperationError, match="Only a mixture"):
        leave_one_out(nn.Linear(1, 1), texts)
    assert leave_one_out(shared, [torch.tensor(text) for text in texts]).loss == pytest.approx(found.loss)


def test_an_expert_that_is_left_out_is_recorded_at_nothing(shared: Any) -> None:
    from loramix.evaluation.ablation import without_expert

    with without_expert(shared, "code"), record_routing(shared) as record:
        shared(tokens(1))
    assert record.metrics().importance[1] == 0
