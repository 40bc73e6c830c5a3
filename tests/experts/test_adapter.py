"""c_e, the scaling of an expert in each module, compared with PEFT."""

from __future__ import annotations

import warnings

import pytest
import torch

from loramix.config.lora import LoraConfig
from loramix.experts.adapter import Adapter, LoraWeights, pattern_value

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.utils.other import get_pattern_key


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.xq_proj, self.v_proj = (torch.nn.Linear(4, 4) for _ in range(3))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])


SETTINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    {"rank_pattern": {"layers.0.q_proj": 3, "q_proj": 2}, "use_rslora": True},
    {"rank_pattern": {r"layers\.1\.(q|v)_proj": 5}, "alpha_pattern": {"^layers.0.v_proj": 9}},
    {"rank_pattern": {"proj": 7, ".*q_proj": 3, "xq_proj": 1}, "alpha_pattern": {"layers.1": 3}},
    {"alpha_pattern": {"xq_proj|v_proj": 6}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_scalings_and_ranks_are_peft_s(settings):
    targets = ["q_proj", "xq_proj", "v_proj"]
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings))
    expert = Adapter("math", LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings), {})
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert len(layers) == 6
    for path, layer in layers.items():
        assert expert.rank(path) == layer.r["default"]
        assert expert.scaling(path) == pytest.approx(layer.scaling["default"], rel=1e-12)


@pytest.mark.parametrize("path", ["q", "a.q", "aq", "a.b.q", "a.q.b", "q\n"])
@pytest.mark.parametrize("key", ["q", "a.q", ".*q", "a|q", "[ab].q", "b"])
def test_pattern_keys_match_as_peft_s(path, key):
    assert (pattern_value({key: 1}, path, 0) == 1) == (get_pattern_key([key], path) == key)


def test_the_first_matching_pattern_wins():
    assert pattern_value({"q": 1, "a.q": 2}, "a.q", 0) == 1
    assert pattern_value({"a.q": 2, "q": 1}, "a.q", 0) == 2


def test_a_module_s_parameters_are_counted():
    weights = LoraWeights(torch.zeros(2, 5), torch.zeros(3, 2), bias=torch.zeros(3), magnitude=torch.zeros(3))
    assert (weights.rank, weights.num_parameters) == (2, 22)
