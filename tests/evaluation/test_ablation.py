"""What each expert is worth: left out in each mode of the routing, and refused where that would say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramix import DataError, RoutingError
from loramix.analysis import record_routing
from loramix.evaluation import leave_one_out
from loramix.evaluation.ablation import without_expert
from support.mixtures import SPARSE, mixture
from support.tiny import tokens

MODES: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"top_k_lora": 2},
    "hard": {"enable_softmax": False, "top_k_lora": 2},
    "hard, all": {"enable_softmax": False},
    "softmax of the kept": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    "softmax at the end": {"enable_softmax": False, "enable_softmax_topk": True},
}


def test_what_cannot_be_left_out_or_read_is_told(experts: Callable[[str], dict[str, str]]) -> None:
    routed = mixture(experts("llama"), layerwise_scalings=True, **SPARSE)
    with pytest.raises(RoutingError, match="which none of the 3 matches"), without_expert(routed, "nobody"):
        pass
    longest = routed.config.max_position_embeddings
    with pytest.raises(DataError, match=f"{longest + 1} tokens with {longest} positions"):
        leave_one_out(routed, [[5] * (longest + 1)])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:enable_softmax_topk is set without")
@pytest.mark.parametrize("mode", MODES)
def test_an_expert_that_is_left_out_has_no_weight(mode: str, experts: Callable[[str], dict[str, str]]) -> None:
    model = mixture(experts("llama"), layerwise_scalings=True, **MODES[mode])
    for place, name in enumerate(model.expert_names):
        with record_routing(model) as record, without_expert(model, name):
            model(tokens(2))
        assert record.scalings[..., place].abs().max() == 0
        assert record.scalings.abs().max() > 0
    found = leave_one_out(model, tokens(2).tolist())
    assert found.tokens == 16
    assert any(found.differences.values())


def test_where_none_can_be_left_out_none_is(experts: Callable[[str], dict[str, str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of softmax twice
        model = mixture(experts("llama"), enable_softmax=True, enable_softmax_topk=True)
    with pytest.raises(RoutingError, match="can be left out"):
        leave_one_out(model, tokens(2).tolist())


def test_a_mixture_that_makes_no_scalings_has_no_answer(experts: Callable[[str], dict[str, str]]) -> None:
    model = mixture(experts("llama"))
    with model.disable_adapter(), pytest.raises(RoutingError, match="routes each token"):
        leave_one_out(model, tokens(2).tolist())
    model.fix_routing([0.2, 0.3, 0.5])
    with pytest.raises(RoutingError, match="routes each token"):
        leave_one_out(model, tokens(2).tolist())


def test_a_loss_that_is_no_number_is_refused(experts: Callable[[str], dict[str, str]]) -> None:
    model = mixture(experts("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(DataError, match="A loss is a number"):
        leave_one_out(model, tokens(2).tolist())
