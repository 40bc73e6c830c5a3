"""A mixture that is written in another format and back is the same, bit by bit."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix import PeftModel, XLoraConfig
from loramix.experts.adapter import Adapter
from loramix.formats import MixtureCheckpoint, load_mixture, save_mixture
from loramix.model.convert import convert
from support.checkpoints import HIDDEN, contents, make_expert, same_expert, same_tensors
from support.mixtures import logits_of, mixture
from support.tiny import llama

PATHS = [f"model.layers.{i}.{part}" for i in (0, 2, 10) for part in ("q", "v")]
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "xlora_depth": st.integers(1, 4),
    "xlora_size": st.integers(1, 9),
    "xlora_dropout_p": st.sampled_from([0.0, 0.1, 0.2]),
    "layerwise_scalings": st.booleans(),
    "enable_softmax": st.booleans(),
    "softmax_temperature": st.floats(0.01, 100),
    "top_k_lora": st.sampled_from([None, 1]),
    "global_scaling_weight": st.floats(-2, 2),
    "scaling_pass_value": st.floats(-1, 1),
    "use_trainable_adapters": st.booleans(),
    "base_model_name_or_path": st.sampled_from(["user/base", "user/other"]),
}
PARTS = {"use_bias": st.booleans(), "enable_relu_and_dropout": st.booleans()}


EXPERTS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 4),
        "modules": st.lists(st.sampled_from(PATHS), min_size=1, unique=True),
        "use_rslora": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    }
)
Drawn = tuple[dict[str, Any], dict[str, dict[str, Any]], torch.dtype]


def mixtures(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[Drawn]:
    """Settings that every format can hold, but for those in `more`; experts by name; the router's dtype."""
    names = st.sampled_from(["math", "code", "数学", "a.b", "1", "0", "default"])
    experts = st.dictionaries(names, EXPERTS, min_size=1, max_size=3)
    return st.tuples(st.fixed_dictionaries(SETTINGS | more), experts, st.sampled_from([torch.float32, torch.bfloat16]))


def made(drawn: Drawn) -> MixtureCheckpoint:
    settings, experts, dtype = copy.deepcopy(drawn)
    found: list[Adapter] = []
    for seed, (name, expert) in enumerate(experts.items()):
        own = expert.pop("dtype")
        found.append(make_expert(name, seed=seed, **expert))
        for weights in found[-1].weights.values():
            weights.A, weights.B = weights.A.to(own), weights.B.to(own)
    if settings["top_k_lora"]:
        settings["scaling_pass_value"] = 0.0
    config = XLoraConfig(hidden_size=HIDDEN, adapters={name: name for name in experts}, **settings)
    shapes = MixtureCheckpoint(config, {}, found).router_shapes() or {}
    return MixtureCheckpoint(config, {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, found)


def there_and_back(start: MixtureCheckpoint, first: str, second: str, third: str, at: Path) -> tuple[Path, Path]:
    """The folder in the first format, and that in the third; experts that lost their names get them back."""
    formats = {"loramix": "xlora", "original": "original"}
    save_mixture(at / "1", start.config, start.router, start.experts, format=formats[first])
    convert(at / "1", at / "2", second)
    names = [expert.name for expert in start.experts]
    places = {name: at / "2" / str(number) for number, name in enumerate(names)} if second == "peft" else None
    if places and set(names) & set(map(str, range(len(names)))) and names != [str(i) for i in range(len(names))]:
        save_named(at / "2", at / "2b", names)  # some of the names are numbers of others
        convert(at / "2b", at / "3", third)
    else:
        convert(at / "2", at / "3", third, adapters=places)
    return at / "1", at / "3"


def configurations(folder: Path) -> dict[str, bytes]:
    return {name: text for name, text in contents(folder).items() if name.endswith(".json")}


def save_named(folder: Path, new: Path, names: list[str]) -> None:
    read = load_mixture(folder)
    read.config.adapters = dict(zip(names, names, strict=True))
    for expert, name in zip(read.experts, names, strict=True):
        expert.name = name
    save_mixture(new, read.config, read.router, read.experts)


def same_mixture(one: MixtureCheckpoint, two: MixtureCheckpoint) -> bool:
    return (
        one.config == two.config
        and list(one.config.adapters) == list(two.config.adapters)
        and same_tensors(one.router, two.router)
        and len(one.experts) == len(two.experts)
        and all(a.name == b.name and same_expert(a, b) for a, b in zip(one.experts, two.experts, strict=True))
    )


@given(mixtures(**PARTS))
@settings(max_examples=25)
def test_loramix_original_loramix(drawn: Drawn) -> None:
    start = made(drawn)
    with tempfile.TemporaryDirectory() as folder:
        first, last = there_and_back(start, "loramix", "original", "loramix", Path(folder))
        assert same_mixture(load_mixture(last), start)
        assert configurations(last) == configurations(first)


@given(mixtures())
@settings(max_examples=25)
def test_loramix_peft_loramix(drawn: Drawn) -> None:
    start = made(drawn)
    with tempfile.TemporaryDirectory() as folder:
        first, last = there_and_back(start, "loramix", "peft", "loramix", Path(folder))
        assert same_mixture(load_mixture(last), start)
        assert configurations(last) == configurations(first)


@given(mixtures())
@settings(max_examples=25)
def test_original_peft_original(drawn: Drawn) -> None:
    start = made(drawn)
    with tempfile.TemporaryDirectory() as folder:
        first, last = there_and_back(start, "original", "peft", "original", Path(folder))
        assert same_mixture(load_mixture(last), start)
        assert configurations(last) == configurations(first)


@pytest.mark.parametrize(
    "config",
    [
        {"xlora_depth": 2, "layerwise_scalings": True, "scaling_pass_value": 0.5},
        {"xlora_depth": 3, "top_k_lora": 2, "softmax_temperature": 0.5, "xlora_dropout_p": 0.0},
        {"use_bias": False, "layerwise_scalings": True},
        {"use_bias": False, "enable_relu_and_dropout": False},
        {"use_bias": False, "xlora_depth": 3, "enable_softmax": False},
    ],
    ids=str,
)
def test_the_logits_are_the_same_in_every_format(config: Any, experts: Any, tmp_path: Path) -> None:
    model = mixture(experts("llama"), **config)
    model.save_pretrained(tmp_path / "loramix")
    convert(tmp_path / "loramix", tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "peft", "peft")
    convert(tmp_path / "peft", tmp_path / "again", "original")
    for folder in ("loramix", "original", "peft", "again"):
        assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path / folder)), logits_of(model))
    saved = [json.loads((tmp_path / folder / "xlora_config.json").read_text()) for folder in ("original", "again")]
    different = {name for name in saved[0] if saved[0][name] != saved[1][name]}
    assert different == {"adapters"} | {name for name in ("use_bias", "enable_relu_and_dropout") if name in config}
