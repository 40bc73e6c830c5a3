"""Laws of the numbers that describe a routing."""

from __future__ import annotations

import math

import pytest
import torch

from loramix.analysis.metrics import METRICS, RoutingMeter, RoutingMetrics, leading_of


def measured(scalings: torch.Tensor, real: torch.Tensor | None = None) -> RoutingMetrics:
    meter = RoutingMeter()
    meter.add(scalings, real)
    found = meter.result()
    assert found is not None
    return found


def one_hot(choices: list[int], experts: int) -> torch.Tensor:
    return torch.eye(experts)[choices].reshape(1, len(choices), 1, experts)


def test_nothing_was_measured_before_anything_was_added() -> None:
    assert RoutingMeter().result() is None


def test_experts_that_were_left_out_of_a_selection_lead_nowhere() -> None:
    chosen = one_hot([0, 0, 0, 3, 3, 3], 4)
    found = measured(chosen[..., [1, 3]])
    assert found.load == pytest.approx([0, 0.5])
    assert found.importance == pytest.approx([0, 0.5])
    assert measured(chosen).load == pytest.approx([0.5, 0, 0, 0.5])


def test_a_uniform_routing_is_balanced_and_tells_nothing_of_its_input() -> None:
    found = measured(torch.full((2, 5, 3, 4), 0.25))
    assert found.importance == pytest.approx([0.25] * 4)
    assert found.importance_cv == pytest.approx(0)
    assert (found.mean_entropy, found.entropy_of_mean) == pytest.approx((1, 1))
    assert found.information == pytest.approx(0, abs=1e-6)
    assert found.effective_experts == pytest.approx(4)


def test_each_token_its_own_expert_is_all_information() -> None:
    found = measured(one_hot([0, 1, 2, 3] * 3, 4))
    assert found.load == pytest.approx([0.25] * 4)
    assert (found.load_cv, found.max_violation, found.dead_share) == pytest.approx((0, 0, 0))
    assert (found.mean_entropy, found.information) == pytest.approx((0, 1))


def test_one_expert_takes_all() -> None:
    found = measured(one_hot([2] * 6, 4))
    assert found.load == (0, 0, 1, 0)
    assert found.max_violation == pytest.approx(3)
    assert found.dead_share == 0.75
    assert found.load_cv == pytest.approx(math.sqrt(3))
    assert (found.effective_experts, found.information) == pytest.approx((1, 0))


def test_permuting_the_experts_permutes_the_load_and_nothing_else() -> None:
    scalings = torch.softmax(torch.randn(2, 7, 3, 4), -1)
    order = [2, 0, 3, 1]
    one, other = measured(scalings), measured(scalings[..., order])
    assert other.load == pytest.approx([one.load[i] for i in order])
    assert other.scalars() == pytest.approx(one.scalars())


def test_batches_add_up_and_padding_does_not_count() -> None:
    scalings = torch.softmax(torch.randn(4, 6, 2, 3), -1)
    real = torch.tensor([[True] * length + [False] * (6 - length) for length in (6, 4, 1, 0)])
    meter = RoutingMeter()
    for row in range(4):
        meter.add(scalings[row : row + 1], real[row : row + 1])
    whole, parts = measured(scalings, real), meter.result()
    assert parts is not None
    assert parts.tokens == whole.tokens == 11
    assert parts.scalars() == pytest.approx(whole.scalars(), abs=1e-6)
    spoilt = torch.where(real[:, :, None, None], scalings, torch.nan)
    assert measured(spoilt, real).scalars() == pytest.approx(whole.scalars())


def test_scalings_that_are_logits_are_measured_by_their_positive_part() -> None:
    found = measured(torch.tensor([[[[2.0, -1.0, 2.0]]]]))
    assert found.importance == pytest.approx([2, -1, 2])
    assert found.mean_entropy == pytest.approx(math.log(2) / math.log(3))


def test_a_single_expert_has_nothing_to_say() -> None:
    assert measured(torch.ones(1, 4, 1, 1)).scalars() == pytest.approx(
        dict.fromkeys(RoutingMetrics((1.0,), (1.0,), 0, 0, 1).scalars(), 0.0) | {"effective_experts": 1.0}
    )


def test_an_expert_that_was_not_selected_leads_nothing() -> None:
    """In hard routing the selected scalings are logits, and may all be below the 0 of the others."""
    scalings = torch.tensor([[[-1.0, 0.0, -0.5]], [[2.0, 0.0, -3.0]], [[0.0, 0.0, 0.0]]])
    assert leading_of(scalings).flatten().tolist() == [2, 0, -1]
    meter = RoutingMeter()
    meter.add(scalings[None, :2])
    found = meter.result()
    assert found is not None
    assert found.load == (0.5, 0.0, 0.5)


def test_every_metric_of_the_table_has_a_row_for_a_reader_and_one_for_programs() -> None:
    found = measured(one_hot([0, 1, 2, 2], 3))
    assert list(found.scalars()) == [metric.name for metric in METRICS]
    assert found.rows() == [
        ("effective experts", "2.83 of 3", "how many a layer uses, over all tokens"),
        ("information", "0.946", "0: the routing does not depend on its input"),
        ("entropy of a token", "0.000", "1: all experts alike in each token; 0: one has all"),
        ("entropy of the mean", "0.946", "1: all experts alike over all tokens"),
        ("MaxVio", "0.50", "0: balanced; 2: one expert leads everywhere"),
        ("CV of load", "0.35", "0: each expert leads as often"),
        ("CV of importance", "0.35", "0: each expert gets as much"),
        ("dead experts", "0%", "as good as never lead"),
    ]
