"""The gating with a share for the base model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from loramix import PeftModel
from loramix.analysis import record_routing
from loramix.evaluation.ablation import without_expert
from loramix.formats import load_mixture, remove_expert
from loramix.model.convert import convert
from loramix.passes.state import attach
from loramix.routers.gating import Gating
from loramix.routers.none import NoneGating
from support.mixtures import HARD, SPARSE, final_scalings, logits_of, mixture
from support.routers import Seen
from support.tiny import llama

Experts = Callable[[str], dict[str, str]]
NONE: dict[str, Any] = {"gating": "with-none"}
MODES = {
    "dense": {},
    "top-k": {"top_k": 2},
    "sparse": {"softmax": False, "top_k": 2, "renormalise": True},
    "hard": {"softmax": False, "top_k": 2},
    "twice": {"top_k": 2, "renormalise": True},
}


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 5), st.floats(-3, 3), st.floats(0.2, 5), st.sampled_from(list(MODES)))
def test_none_is_one_expert_more_without_matrices(
    seed: int, experts: int, logit: float, temperature: float, mode: str
) -> None:
    z = torch.randn(3, 2, experts, generator=torch.Generator().manual_seed(seed))
    wide = torch.cat([z, torch.full((3, 2, 1), logit)], -1)
    plain = Gating(temperature=temperature, **MODES[mode])
    none = NoneGating(temperature=temperature, **MODES[mode], none_logit=logit)
    activated = plain.activate(wide)
    assert_close(none.activate(z), activated[..., :-1])
    assert_close(none.select(none.activate(z)), plain.select(activated)[..., :-1], atol=1e-6, rtol=1e-5)
    assert_close(none.shares(z, none.activate(z)), plain.shares(wide, activated)[..., :-1])


@settings(max_examples=30)
@given(st.integers(0, 2**16), st.floats(-3, 3))
def test_its_logit_needs_no_parameter(seed: int, shift: float) -> None:
    """E + 1 logits with any none are E logits with none at 0."""
    z = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(seed))
    assert_close(NoneGating(none_logit=shift).activate(z), NoneGating().activate(z - shift))


def test_the_ends() -> None:
    z = torch.tensor([[1.0, 2.0]])
    assert_close(NoneGating(none_logit=-50.0).activate(z), Gating().activate(z))
    assert NoneGating(none_logit=50.0).activate(z).sum() < 1e-8
    assert torch.equal(
        NoneGating(top_k=1, none_logit=3.0).select(NoneGating(top_k=1, none_logit=3.0).activate(z)), 0 * z
    )
    uniform = NoneGating(none_logit=0.7)
    assert_close(uniform.activate(torch.full((1, 4), uniform.uniform(4))), torch.full((1, 4), 0.2))
    assert NoneGating(softmax=False).uniform(4) == 0.25


@pytest.mark.parametrize("gating", [{}, {"top_k_lora": 1}, SPARSE, HARD], ids=["dense", "top-1", "sparse", "hard"])
def test_none_adds_nothing(gating: dict[str, Any], experts: Experts) -> None:
    """With all to none the mixture is its base model, and with nothing to none what it is without."""
    folders = experts("llama")
    never, always = ({**NONE, "gating_settings": {"none_logit": logit}} for logit in (-1e4, 1e4))
    assert_close(logits_of(mixture(folders, **gating, **never)), logits_of(mixture(folders, **gating)))
    if gating != HARD:  # which keeps the best expert beside none
        assert_close(logits_of(mixture(folders, **gating, **always)), logits_of(llama()))


def test_the_scalings_and_records_are_those_of_the_experts(experts: Experts) -> None:
    model, seen = mixture(experts("llama"), top_k_lora=1, **NONE), Seen()
    attach(model, seen)
    with record_routing(model) as record:
        logits_of(model)
    (output,) = seen.outputs
    assert output.final.shape[-1] == 3
    total = output.activated.sum(-1)
    assert ((total > 0) & (total < 1)).all()
    wide = torch.cat([output.activated, 1 - total[..., None]], -1)
    assert torch.equal((output.final > 0).any(-1), wide.argmax(-1) != 3)
    assert (output.final.sum(-1) == 0).any()  # some tokens take no expert
    assert_close(record.part.scalings, output.final.flatten(0, 1).expand(-1, record.part.scalings.shape[1], -1))
    found = record.metrics().scalars()
    assert all(torch.tensor(value).isfinite() for value in found.values()), found


def test_it_is_cached_saved_edited_and_left_out_as_any_other(experts: Experts, tmp_path: Path) -> None:
    model = mixture(experts("llama"), **NONE, gating_settings={"none_logit": 0.5})
    ids = torch.arange(4, 20)[None]
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.peft_config["default"].peft_type.value == "LORAMIX"
    smaller = remove_expert(load_mixture(tmp_path), "code")
    assert smaller.config.gating_settings == {"none_logit": 0.5}
    scalings = final_scalings(model)
    with without_expert(model, "code"):
        left = final_scalings(model)
    assert left[..., 1].max() == 0
    assert_close(left[..., 0] / left[..., 2], scalings[..., 0] / scalings[..., 2])
    assert (left.sum(-1) < 1).all()


def test_other_formats_cannot_hold_it(experts: Experts, tmp_path: Path) -> None:
    mixture(experts("llama"), **NONE).save_pretrained(tmp_path / "mixture")
    for to in ("peft", "original"):
        with pytest.raises(Exception, match="with-none"):
            convert(tmp_path / "mixture", tmp_path / to, to)


def test_the_gradient_teaches_it(experts: Experts) -> None:
    """Where experts only harm, training gives their share to none."""
    model = mixture(experts("llama"), router="static", **NONE)
    hook = Seen()
    attach(model, hook)
    with torch.no_grad():
        target = logits_of(llama()).softmax(-1)
    optimizer = torch.optim.Adam(model.router.parameters(), lr=0.3)
    ids = torch.randint(4, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), target.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert total(hook.outputs[0].final) > 0.7 > 0.2 > total(hook.outputs[-1].final)


def total(scalings: Tensor) -> float:
    return float(scalings.detach().sum(-1).mean())
