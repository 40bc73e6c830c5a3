"""Routing that is fixed: one pass per token from then on, and what can be made of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from loramix import ConfigurationError, LoraConfig, PeftModel, RoutingError, UnsupportedOperationError
from loramix.passes.cache import TwoPassCache
from support.generation import generated
from support.mixtures import SPARSE, logits_of, mixture
from support.peft_side import PEFT_WARNINGS
from support.tiny import gpt2, llama, save_expert, save_experts, tokens


@pytest.fixture
def model(experts: Any) -> Any:
    return mixture(experts("llama"), layerwise_scalings=True)


def test_fixed_scalings_stay_until_they_are_released(model: Any) -> None:
    routed = logits_of(model)
    with model.fixed_scalings([0.2, 0.3, 0.5]):
        expected = logits_of(model)
    model.fix_routing([0.2, 0.3, 0.5])
    assert torch.equal(logits_of(model), expected)
    assert model.fixed_routing.shape == (len(model.adapted_modules), 3)
    with model.fixed_scalings([1.0, 0.0, 0.0]):
        assert not torch.equal(logits_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(llama()))
    twin = copy.deepcopy(model)
    model.unfix_routing()
    assert torch.equal(logits_of(model), routed)
    assert model.fixed_routing is None
    assert torch.equal(logits_of(twin), expected)


def test_one_pass_is_made(model: Any) -> None:
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.fix_routing([0.2, 0.3, 0.5])
    generated(model, input_ids=tokens(1), max_new_tokens=5)
    assert len(calls) == 5


def test_a_prompt_fixes_the_mean_of_its_scalings(model: Any) -> None:
    ids, mask = tokens(), torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    model.fix_routing(prompt={"input_ids": ids, "attention_mask": mask})
    found = model.fixed_routing
    model.unfix_routing()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    assert_close(found, model.get_latest_scalings()[mask.bool()].mean(0))
    model.fix_routing(prompt={"input_ids": ids})
    assert_close(model.fixed_routing.sum(-1), torch.ones(len(model.adapted_modules)))


@pytest.mark.parametrize("lockstep", [True, False, None])
@pytest.mark.parametrize("after", [1, 5])
def test_after_some_tokens_each_row_keeps_the_mean_of_its_scalings(model: Any, after: int, lockstep: Any) -> None:
    """Against a loop that does it by hand: two passes, then one with each row's own scalings."""
    new, found = 12, []
    for row in tokens().split(1):
        ids, seen = row, []
        for step in range(new):
            if step <= after:
                with torch.no_grad():
                    out = model(ids).logits
                if step:
                    seen.append(model.get_latest_scalings()[0, -1])
                ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
                cache = None
            else:
                if cache is None:
                    cache = model(ids[:, :-1], use_cache=True).past_key_values
                    cache.separate()
                with model.fixed_scalings(torch.stack(seen).mean(0)), torch.no_grad():
                    out = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
                ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
        found.append(ids)
    model.fix_routing(after=after)
    out = generated(model, input_ids=tokens(), max_new_tokens=new, lockstep=lockstep, return_dict_in_generate=True)
    assert torch.equal(out.sequences, torch.cat(found))
    assert not isinstance(out.past_key_values, TwoPassCache)
    assert model.lockstep_report.forwards <= new - 1 + after + 1
    assert model.fixed_routing is None  # each generation has its own


def test_where_it_cannot_be_fixed_on_the_way_it_says_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramix.model.generation._warned", set())
    model.fix_routing(after=2)
    with pytest.warns(UserWarning, match=r"fix_routing\(after=2\) has no effect: only greedy"):
        generated(model, input_ids=tokens(), num_beams=2, max_new_tokens=4)


@pytest.mark.parametrize("wrong", [{}, {"scalings": [1.0, 0.0, 0.0], "after": 2}, {"after": 0}])
def test_it_is_fixed_in_one_way(wrong: dict[str, Any], model: Any) -> None:
    with pytest.raises(ConfigurationError, match="by one of them"):
        model.fix_routing(**wrong)
    with pytest.raises(RoutingError, match="for each expert"):
        model.fix_routing([1.0])


def test_merged_it_is_an_ordinary_model(model: Any, tmp_path: Path) -> None:
    model.fix_routing(prompt={"input_ids": tokens()})
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [{}, {**SPARSE, "layerwise_scalings": True}], ids=["shared", "sparse by layer"])
def test_saved_as_one_adapter_it_is_the_same_anywhere(
    architecture: str, config: dict[str, Any], experts: Any, tmp_path: Path
) -> None:
    make = {"llama": llama, "gpt2": gpt2}[architecture]
    model = mixture(experts(architecture), architecture, **config)
    model.fix_routing(prompt={"input_ids": tokens(1, 1)})
    expected = logits_of(model)
    assert model.save_fixed(tmp_path) == 0.0
    assert_close(logits_of(PeftModel.from_pretrained(make(), tmp_path)), expected, atol=1e-5, rtol=1e-4)
    assert_close(logits_of(peft.PeftModel.from_pretrained(make(), tmp_path)), expected, atol=1e-5, rtol=1e-4)


def test_a_lower_rank_is_the_nearest_and_its_error_is_told(model: Any, tmp_path: Path) -> None:
    model.fix_routing([0.2, 0.3, 0.5])
    weights = {name: p.detach().clone() for name, p in llama().named_parameters()}

    def added(net: Any) -> dict[str, torch.Tensor]:
        return {n: p.detach() - weights[n] for n, p in net.named_parameters() if "proj" in n}

    errors = [model.save_fixed(tmp_path / str(rank), rank=rank) for rank in (1, 4, 100)]
    assert errors[0] > errors[1] > errors[2] == 0.0
    whole = added(copy.deepcopy(model).merge_and_unload())
    for rank, error in ((1, errors[0]), (4, errors[1])):
        near: Any = PeftModel.from_pretrained(llama(), tmp_path / str(rank))
        found = added(near.merge_and_unload())
        lost = sum((whole[n] - found[n]).square().sum() for n in whole) / sum(d.square().sum() for d in whole.values())
        assert float(lost) ** 0.5 == pytest.approx(error, rel=1e-3)
        best = {n: torch.linalg.svdvals(d)[rank:].square().sum() for n, d in whole.items()}
        assert float(sum(best.values()) / sum(d.square().sum() for d in whole.values())) ** 0.5 == pytest.approx(
            error, rel=1e-3
        )
    with pytest.raises(ConfigurationError, match="at least 1"):
        model.save_fixed(tmp_path / "none", rank=0)


def test_a_rank_between_a_layers_sides(tmp_path: Path) -> None:
    """Wider than the narrow side of a layer, and below the experts' ranks together."""
    model = mixture(save_experts(tmp_path, "llama", r=16))
    model.fix_routing([0.2, 0.3, 0.5])
    assert 0 < model.save_fixed(tmp_path / "one", rank=40) < 0.1
    assert_close(logits_of(PeftModel.from_pretrained(llama(), tmp_path / "one")), logits_of(model), atol=0.1, rtol=0.1)


def test_a_fix_that_fails_leaves_the_one_before(model: Any) -> None:
    model.fix_routing([0.2, 0.3, 0.5])
    expected, modes = model.fixed_routing, [module.training for module in model.modules()]
    empty = {"input_ids": tokens(), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    for wrong in ({"scalings": [1.0]}, {"prompt": empty}):
        with pytest.raises(RoutingError):
            model.fix_routing(**wrong)
        assert torch.equal(model.fixed_routing, expected)
    with model.fixed_scalings([1.0, 0.0, 0.0]), pytest.raises(RoutingError, match="is routed"):
        model.fix_routing(prompt={"input_ids": tokens()})
    assert [module.training for module in model.modules()] == modes


def test_a_mixture_that_routes_is_no_single_adapter(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperationError, match="fix_routing"):
        model.save_fixed(tmp_path / "x")
    with pytest.raises(UnsupportedOperationError, match="fix_routing"):
        model.merge_and_unload()
    assert not (tmp_path / "x").exists()


def test_what_two_matrices_do_not_hold_is_refused(tmp_path: Path) -> None:
    experts = {"one": save_expert(tmp_path / "one", llama(), target_modules=["q_proj"], use_dora=True)}
    model = mixture(experts)
    model.fix_routing([1.0])
    with pytest.raises(UnsupportedOperationError, match="DoRA"):
        model.save_fixed(tmp_path / "x")


def test_embeddings_are_saved_too(tmp_path: Path) -> None:
    experts = save_experts(tmp_path, "llama", target_modules=["embed_tokens", "v_proj"])
    model = mixture(experts)
    model.fix_routing([0.5, 0.25, 0.25])
    model.save_fixed(tmp_path / "one")
    assert_close(
        logits_of(PeftModel.from_pretrained(llama(), tmp_path / "one")), logits_of(model), atol=1e-5, rtol=1e-4
    )
    assert isinstance(LoraConfig.from_pretrained(tmp_path / "one"), LoraConfig)
