"""Writes the table of formats in docs/mixtures.md from conversions. `make docs` runs it; a test compares the page."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loramix import LoraConfig, XLoraConfig
from loramix.errors import LoramixError
from loramix.experts.adapter import Adapter, LoraWeights
from loramix.formats import MixtureCheckpoint, load_mixture, save_mixture
from loramix.model.convert import FORMATS, convert
from loramix.routers import RouterSizes, router_class

PAGE = Path(__file__).with_name("mixtures.md")
BEGIN, END = "<!-- formats -->\n", "<!-- /formats -->\n"
SIZE, PATH = 4, "model.layers.0.self_attn.q_proj"
TARGETS = ("loramix", "peft", "original")
assert set(TARGETS) == set(FORMATS)


def expert(name: str = "math", path: str = PATH, *, embedding: bool = False, **config: Any) -> Adapter:
    settings = LoraConfig(r=2, target_modules=[path.rpartition(".")[2]], **config)
    parts = {
        "bias": torch.ones(SIZE) if settings.lora_bias else None,
        "magnitude": torch.ones(SIZE) if settings.use_dora else None,
    }
    return Adapter(
        name, settings, {path: LoraWeights(torch.ones(2, SIZE), torch.ones(SIZE, 2), **parts, embedding=embedding)}
    )


def mixture(*experts: Adapter, base_weights: dict[str, torch.Tensor] | None = None, **config: Any) -> MixtureCheckpoint:
    found = list(experts or [expert()])
    settings = XLoraConfig(**{"hidden_size": SIZE, "adapters": {each.name: each.name for each in found}, **config})
    shapes = router_class(settings).shapes(settings, RouterSizes(SIZE, 1, len(found)))
    return MixtureCheckpoint(
        settings, {name: torch.ones(shape) for name, shape in shapes.items()}, found, base_weights or {}
    )


TWO = (expert("math"), expert("code"))
WITH_TWO_LAYERS = {"xlora_depth": 2, "xlora_size": 3}
FEATURES: dict[str, Callable[[], MixtureCheckpoint]] = {
    "the router, bit by bit, and the experts": lambda: mixture(expert("0")),
    "the experts' names": mixture,
    "where experts came from": lambda: mixture(adapters={"math": "user/math"}),
    "`task_type`, `revision`": lambda: mixture(expert("0"), task_type="CAUSAL_LM", revision="v1"),
    "other routers than the classifier": lambda: mixture(expert("0"), router="static"),
    "`elsewhere`": lambda: mixture(expert("0"), elsewhere={"vision": "uniform"}),
    "`use_bias=False`": lambda: mixture(expert("0"), use_bias=False),
    "`enable_relu_and_dropout=False`, depth 1": lambda: mixture(expert("0"), enable_relu_and_dropout=False),
    "`enable_relu_and_dropout=False`, depth > 1": lambda: mixture(
        expert("0"), enable_relu_and_dropout=False, **WITH_TWO_LAYERS
    ),
    "`top_k_lora`": lambda: mixture(*map(numbered, range(2)), top_k_lora=1),
    "`top_k_lora` with `scaling_pass_value`": lambda: mixture(
        *map(numbered, range(2)), top_k_lora=1, scaling_pass_value=0.5
    ),
    "`enable_softmax_topk`": lambda: mixture(
        *map(numbered, range(2)), top_k_lora=1, enable_softmax_topk=True, enable_softmax=False
    ),
    "embeddings and heads of its own": lambda: mixture(
        expert("0"), base_weights={"lm_head.weight": torch.ones(2, SIZE)}
    ),
    "experts with rsLoRA, `rank_pattern`, `alpha_pattern`": lambda: mixture(
        expert("0", use_rslora=True, rank_pattern={"k_proj": 3}, alpha_pattern={"q_proj": 3})
    ),
    "experts with DoRA": lambda: mixture(expert("0", use_dora=True)),
    "experts with LoRA biases": lambda: mixture(expert("0", lora_bias=True)),
    "experts of embeddings": lambda: mixture(expert("0", "model.embed_tokens", embedding=True)),
    "experts of layers that are not below `model`": lambda: mixture(expert("0", "lm_head")),
}


def numbered(number: int) -> Adapter:
    return expert(str(number))


def section() -> str:
    """The table."""
    rows = [
        f"| {feature} | {' | '.join(outcome(make(), target) for target in TARGETS)} |"
        for feature, make in FEATURES.items()
    ]
    return "\n".join([f"| a mixture's | {' | '.join(TARGETS)} |", "|---|" + "---|" * len(TARGETS), *rows]) + "\n"


def outcome(start: MixtureCheckpoint, target: str) -> str:
    """kept: the mixture that is read again is the same; told: it is another one, and the report says so; or refused."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = Path(folder) / "first", Path(folder) / "second"
        save_mixture(first, start.config, start.router, start.experts, base_weights=start.base_weights)
        try:
            done = convert(first, second, target)
        except LoramixError:
            return "refused"
        before, after = load_mixture(first), load_mixture(second)
        if target == "peft":  # its places are in the report of every conversion
            places = {name: str(second.resolve() / name) for name in after.config.adapters}
            assert after.config.adapters == places
            after.config.adapters = {name: name for name in places}
        if same(before, after):
            return "kept"
        assert any("not kept" in note or "not taken" in note for note in done.notes), (start.config, target)
        return "told"


def same(one: MixtureCheckpoint, two: MixtureCheckpoint) -> bool:
    tensors = [parts(each) for each in (one, two)]
    return (
        replace(one.config) == replace(two.config)
        and [(each.name, each.config) for each in one.experts] == [(each.name, each.config) for each in two.experts]
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    )


def parts(mixture: MixtureCheckpoint) -> dict[str, torch.Tensor]:
    found = {**mixture.router, **mixture.base_weights}
    for each in mixture.experts:
        for path, weights in each.weights.items():
            found |= {f"{each.name} {path} {i}": tensor for i, tensor in enumerate(weights.tensors)}
    return found


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + section() + END + rest.partition(END)[2], encoding="utf-8")
