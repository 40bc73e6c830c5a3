"""One expert's column of the router, from a few texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loramix import (
    ConfigurationError,
    DataError,
    PeftModel,
    UnsupportedOperationError,
    XLoraConfig,
    get_peft_model,
)
from loramix.formats import add_expert, load_adapter, load_mixture, save_mixture
from loramix.training import fit_expert
from support.mixtures import HARD, SPARSE
from support.tiny import llama

Experts = Callable[[str], dict[str, str]]
WORDS = {"math": (4, 30), "code": (30, 60), "prose": (60, 96)}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "cool": {"softmax_temperature": 0.5},
    "sparse": SPARSE,
    "none": {"gating": "with-none"},
    "layerwise": {"layerwise_scalings": True},
    "deep": {"xlora_depth": 2, "xlora_size": 64},
}


class Words:
    """A tokenizer of numbers."""

    model_max_length = 10**30

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


def texts(seed: int = 0) -> dict[str, list[str]]:
    """Each expert's texts use words of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [" ".join(map(str, torch.randint(*ends, (30,), generator=generator).tolist())) for _ in range(8)]
        for name, ends in WORDS.items()
    }


def mixture(folders: dict[str, str], **config: Any) -> Any:
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, XLoraConfig(hidden_size=64, adapters=folders, **config)).eval()


@torch.no_grad()
def shares(model: Any, found: dict[str, list[str]], expert: int) -> dict[str, float]:
    """The mean scaling of an expert on each expert's texts."""
    means: dict[str, float] = {}
    for name, words in found.items():
        model(torch.cat([Words()(text)["input_ids"] for text in words]))
        means[name] = float(model.get_latest_scalings().float()[..., expert].mean())
    return means


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_new_expert_gets_its_text_and_no_other_logit_changes(settings: str, experts: Experts, tmp_path: Path) -> None:
    folders = experts("llama")
    mixture({name: folders[name] for name in ("math", "code")}, **SETTINGS[settings]).save_pretrained(tmp_path / "old")
    larger = add_expert(load_mixture(tmp_path / "old"), load_adapter("prose", folders["prose"]))
    save_mixture(tmp_path / "new", larger.config, larger.router, larger.experts)
    model: Any = PeftModel.from_pretrained(llama(), tmp_path / "new")
    before = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    fit = fit_expert(model, "prose", tokenizer=Words(), prompts=texts())
    assert fit.own > 2 * fit.others
    last = f"layers.{len(model.router.layers) - 1}."
    for name, tensor in model.router.state_dict().items():
        old, new = (each.unflatten(0, (-1, 3)) if name.startswith(last) else each for each in (before[name], tensor))
        assert torch.equal(new[:, :2], old[:, :2]) if name.startswith(last) else torch.equal(new, old)
    if settings != "sparse":  # which shows scalings before its softmax
        found = shares(model, texts(seed=1), 2)
        assert found["prose"] > 1.5 * max(found["math"], found["code"])


def test_the_fit_does_not_depend_on_where_it_starts(experts: Experts) -> None:
    model = mixture(experts("llama"))
    fit_expert(model, "code", tokenizer=Words(), prompts=texts())
    first = model.router.layers[0].weight.clone()
    with torch.no_grad():
        model.router.layers[0].weight[1] += 7
    fit_expert(model, "code", tokenizer=Words(), prompts=texts())
    assert torch.equal(model.router.layers[0].weight, first)


def test_what_cannot_be_fitted(experts: Experts) -> None:
    folders, given = experts("llama"), {"tokenizer": Words(), "prompts": texts()}
    with pytest.raises(UnsupportedOperationError, match="router='static'"):
        fit_expert(mixture(folders, router="static"), "code", **given)
    with pytest.raises(UnsupportedOperationError, match="classifier with biases"):
        fit_expert(mixture(folders, use_bias=False), "code", **given)
    for model, name in ((mixture(folders), "poems"), (mixture(folders, **HARD), "code")):
        with pytest.raises(ConfigurationError, match=f"'{name}' of 'math', 'code', 'prose'"):
            fit_expert(model, name, **given)
    with pytest.raises(DataError, match="'code'"):
        fit_expert(mixture(folders), "code", tokenizer=Words(), prompts={"math": ["5 6"], "prose": ["7"]})
