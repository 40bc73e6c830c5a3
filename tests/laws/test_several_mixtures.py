"""Each of several mixtures on one base model is, bit for bit, what it is on a base model of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from loramix import LoraConfig, PeftModel, get_peft_model
from loramix.analysis import record_routing
from support.mixtures import HARD, SPARSE, far, logits_of, mixture
from support.tiny import ARCHITECTURES, TARGETS, build, llama, qwen3_moe, save_expert, save_experts, tokens

NEW = 6
OTHERS: dict[str, dict[str, Any]] = {
    "shared": {},
    "sparse, layerwise": {**SPARSE, "layerwise_scalings": True, "scaling_pass_value": 0.2},
    "hard": HARD,
    "none": {"gating": "with-none"},
    "static": {"router": "static", "layerwise_scalings": True},
    "prototypes": {"router": "prototypes"},
    "arrow": {"router": "arrow", "layerwise_scalings": True},
    "norm": {"router": "norm", "layerwise_scalings": True},
    "linear": {"router": "linear", "layerwise_scalings": True},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "fewer layers": {"target_modules": ["q_proj"]},
    "other layers": {"target_modules": ["embed_tokens", "lm_head"]},
    "DoRA and more layers": {"target_modules": [*TARGETS["llama"], "lm_head"], "use_dora": True, "r": 5},
    "LoRA biases": {"target_modules": ["k_proj", "down_proj"], "lora_bias": True, "r": 1},
}

Base = Callable[[], Any]
Watch = Callable[[Any], Any]


def scalings(model: Any) -> Any:
    logits_of(model, tokens(3, 5))
    return model.get_latest_scalings(), model.internal_xlora_scalings


def logged(model: Any) -> Any:
    model.enable_scalings_logging()
    logits_of(model, tokens(1, 4))
    logits_of(model, tokens(2, 5))
    model.disable_scalings_logging()
    return model.get_scalings_log()


def greedy(model: Any) -> Any:
    out = model.generate(tokens(), max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.sequences, *out.logits


def uncached(model: Any) -> Any:
    return model.generate(tokens(), max_new_tokens=NEW, do_sample=False, use_cache=False)


def sampled(model: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(tokens(), max_new_tokens=NEW, do_sample=True, temperature=2.0)


def beams(model: Any) -> Any:
    return model.generate(tokens(), max_new_tokens=NEW, do_sample=False, num_beams=3)


def lockstep(model: Any) -> Any:
    found = [model.generate(tokens(), max_new_tokens=NEW, do_sample=False, lockstep=how) for how in (True, 3, "lookup")]
    return *found, model.lockstep_report.forwards


def fixed(model: Any) -> Any:
    with model.fixed_scalings([0.5] * len(model.expert_names)):
        return logits_of(model), greedy(model)


def disabled(model: Any) -> Any:
    with model.disable_adapter():
        return logits_of(model)


def recorded(model: Any) -> Any:
    with record_routing(model) as record:
        logits_of(model)
    return record.scalings, record.tokens


def cached(model: Any) -> Any:
    first = model(tokens(), use_cache=True)
    return model(tokens(2, 2, seed=4), past_key_values=first.past_key_values).logits.detach()


def gradient(model: Any) -> Any:
    trained = [parameter for parameter in model.router.parameters() if parameter.is_floating_point()]
    with torch.enable_grad():
        for parameter in trained:
            parameter.requires_grad_(True)
        loss = model(tokens(), labels=tokens()).loss
        found = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else [loss]
    for parameter in trained:
        parameter.requires_grad_(False)
    return [None if each is None else each.detach() for each in found]


def names(model: Any) -> Any:
    members = model.peft_config[model.active_adapter].to_dict()
    return members, model.expert_names, model.adapted_modules, sorted(model.state_dict()), model.get_nb_trainable_parameters()


WATCHES: dict[str, Watch] = {
    w.__name__: w
    for w in (scalings, logged, greedy, uncached, sampled, beams, fixed, disabled, recorded, cached, gradient, names)
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return list(one) == list(other) and same(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): load_file(p) if p.suffix == ".safetensors" else p.read_text() for p in paths}


def check(base: Base, folders: dict[str, Path], watches: dict[str, Watch], tmp_path: Path) -> Any:
    """Both mixtures on one base model, in turns, against each alone; the model is returned."""
    alone = {name: PeftModel.from_pretrained(base(), folder) for name, folder in folders.items()}
    first, second = folders
    model: Any = PeftModel.from_pretrained(base(), folders[first], first)
    model.load_mixture(folders[second], second)
    for watch in watches.values():
        for name in (first, second, first):
            expected = watch(alone[name])
            with model.use_mixture(name):
                assert same(watch(model), expected), (watch, name)
    for name in folders:
        with model.use_mixture(name):
            written = saved(model, tmp_path / f"of one, {name}")
        assert same(written, saved(alone[name], tmp_path / f"alone, {name}"))
    return model


@pytest.fixture(scope="module")
def first(experts: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts on all linear layers, with layerwise scalings."""
    folder = tmp_path_factory.mktemp("first")
    mixture(experts("llama"), layerwise_scalings=True).save_pretrained(folder)
    return folder


def write(folder: Path, architecture: str, config: dict[str, Any], **experts: Any) -> Path:
    """A saved mixture of two experts."""
    found = save_experts(folder / "experts", architecture, names=("x", "y"), **experts)
    model = mixture(found, architecture, **config)
    if config.get("router") not in (None, "classifier"):
        with torch.no_grad():
            for parameter in model.router.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "mixture")
    return folder / "mixture"


@pytest.mark.parametrize("kind", OTHERS)
def test_of_any_router_and_gating(kind: str, first: Path, tmp_path: Path) -> None:
    second = write(tmp_path, "llama", OTHERS[kind], target_modules=["v_proj", "down_proj"])
    watches = WATCHES if kind in ("sparse, layerwise", "linear") else {n: WATCHES[n] for n in ("scalings", "greedy")}
    check(llama, {"a": first, "b": second}, watches, tmp_path)


@pytest.mark.parametrize("kind", EXPERTS)
def test_of_experts_that_adapt_other_layers(kind: str, first: Path, tmp_path: Path) -> None:
    second = write(tmp_path, "llama", {}, **EXPERTS[kind])
    watches = {n: WATCHES[n] for n in ("scalings", "greedy", "fixed", "names", "gradient")}
    for order in ({"a": first, "b": second}, {"b": second, "a": first}):
        check(llama, order, watches, tmp_path / "-".join(order))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_on_any_base_model(architecture: str, experts: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    mixture(experts(architecture), architecture).save_pretrained(tmp_path / "a")
    last = TARGETS[architecture][-1:]
    second = write(tmp_path, architecture, {"layerwise_scalings": True}, target_modules=last)
    watches = {n: WATCHES[n] for n in ("scalings", "greedy", "cached", "beams")}
    check(ARCHITECTURES[architecture], {"a": tmp_path / "a", "b": second}, watches, tmp_path)
