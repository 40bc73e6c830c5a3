"""Private names of other libraries that loramix leans on, all of them, each with what it has to do.

A release may drop any of them. Then the test of that name fails here, before anything else fails somewhere.
"""

from __future__ import annotations

import ast
import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import GenerationConfig

import loramix
from loramix._compat import enable_checkpointing
from support.tiny import llama, tokens

SOURCES = Path(loramix.__file__).parent
NAMES = {  # name -> the file that leans on it
    # transformers
    "_sample": "model/generation.py",
    "_get_logits_processor": "model/generation.py",
    "_eos_token_tensor": "model/generation.py",
    "_attn_implementation": "decoding/eligibility.py",
    "_set_gradient_checkpointing": "passes/checkpointing.py",
    "_gradient_checkpointing_func": "passes/checkpointing.py",
    "_supports_default_dynamic_cache": "_compat.py",
    # accelerate
    "_old_forward": "passes/specialise.py",
    "_is_accelerate_prepared": "model/reference.py",
    # torch
    "_ConvNd": "experts/base_layers.py",
    "_apply": "layers/stack.py",
    "_load_from_state_dict": "layers/layer.py",
    "_forward_hooks": "decoding/eligibility.py",
    "_forward_pre_hooks": "decoding/eligibility.py",
    "_backward_hooks": "layers/stack.py",
    "_backward_pre_hooks": "layers/stack.py",
    "_has_any_global_hook": "layers/stack.py",
    "_modules": "layers/layer.py",
    "_parameters": "layers/stack.py",
    "_buffers": "model/several.py",
    "_non_persistent_buffers_set": "model/several.py",
    "_replicate_for_data_parallel": "model/several.py",
    "_cdata": "model/several.py",
    "_dynamo_marked_constant": "layers/fused.py",
    "_disable_dynamo": "layers/layer.py",
}


class Spy:
    """A method of a model's class that notes how it is called."""

    def __init__(self, model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        real = getattr(type(model), name)

        @functools.wraps(real)
        def method(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            return real(model, *args, **kwargs)

        monkeypatch.setattr(type(model), name, method)


def generate(model: Any, **settings: Any) -> Any:
    config = GenerationConfig(max_new_tokens=2, eos_token_id=95, pad_token_id=0, **settings)
    return model.generate(tokens(1), generation_config=config, attention_mask=torch.ones_like(tokens(1)))


@pytest.mark.parametrize("do_sample", [False, True])
def test_sample(do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` decodes greedily and samples in `_sample`, and names its arguments."""
    model = llama()
    spy = Spy(model, "_sample", monkeypatch)
    generate(model, do_sample=do_sample)
    ((args, kwargs),) = spy.calls
    assert len(args) == 1
    assert {"stopping_criteria", "generation_config", "logits_processor"} <= kwargs.keys()


def test_get_logits_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returns is called with every token's scores."""
    model, seen = llama(), list[int]()
    monkeypatch.setattr(
        model, "_get_logits_processor", lambda **_: lambda ids, scores: seen.append(ids.shape[1]) or scores
    )
    generate(model)
    assert seen == [9, 10]


def test_eos_token_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration that `_sample` is given holds the end tokens as a tensor."""
    model = llama()
    spy = Spy(model, "_sample", monkeypatch)
    generate(model)
    assert spy.calls[0][1]["generation_config"]._eos_token_tensor.tolist() == [95]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attn_implementation(kind: str) -> None:
    assert llama(attn_implementation=kind).config._attn_implementation == kind


def test_set_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enabling goes through it, with the function that checkpoints."""
    model = llama()
    spy = Spy(model, "_set_gradient_checkpointing", monkeypatch)
    enable_checkpointing(model, use_reentrant=False)
    ((_, kwargs),) = spy.calls
    assert callable(kwargs["gradient_checkpointing_func"])


def test_gradient_checkpointing_func() -> None:
    """Whatever checkpoints holds the function, with its arguments to be seen."""
    model = llama()
    enable_checkpointing(model, use_reentrant=False)
    found = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert found
    assert all(function.keywords == {"use_reentrant": False} for function in found)


def test_supports_default_dynamic_cache() -> None:
    assert llama()._supports_default_dynamic_cache()


def test_old_forward() -> None:
    """A hook of accelerate keeps the forward that it wraps under this name."""
    layer = nn.Linear(2, 2)
    forward = layer.forward
    add_hook_to_module(layer, ModelHook())
    assert layer._old_forward == forward


def test_is_accelerate_prepared() -> None:
    """A model that was prepared has it, and is not prepared again."""
    layer = nn.Linear(2, 2)
    Accelerator(cpu=True).prepare(layer)
    assert layer._is_accelerate_prepared


def test_ConvNd() -> None:
    from torch.nn.modules.conv import _ConvNd

    assert issubclass(nn.Conv1d, _ConvNd)
    assert issubclass(nn.Conv2d, _ConvNd)


class Probe(nn.Module):
    """A module that notes which of its private methods are called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.called: list[str] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.called.append("_apply")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.called.append(f"{prefix} {sorted(state_dict)}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_apply() -> None:
    """Moving a module and changing its dtype go through it."""
    probe = Probe()
    nn.Sequential(probe).to(torch.float64)
    assert probe.called == ["_apply"]
    assert probe.weight.dtype == torch.float64


def test_load_from_state_dict() -> None:
    """Loading a model asks each module, with its prefix."""
    probe = Probe()
    nn.Sequential(probe).load_state_dict({"0.weight": torch.zeros(1)})
    assert probe.called == ["0. ['0.weight']"]


@pytest.mark.parametrize(
    ("name", "register"),
    [
        ("_forward_hooks", "register_forward_hook"),
        ("_forward_pre_hooks", "register_forward_pre_hook"),
        ("_backward_hooks", "register_full_backward_hook"),
        ("_backward_pre_hooks", "register_full_backward_pre_hook"),
    ],
)
def test_hooks_are_listed(name: str, register: str) -> None:
    layer = nn.Linear(2, 2)
    assert not getattr(layer, name)
    getattr(layer, register)(print)
    assert list(getattr(layer, name).values()) == [print]


def test_has_any_global_hook() -> None:
    asked = nn.modules.module._has_any_global_hook
    assert not asked()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert asked()
    handle.remove()


def test_modules_and_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert model._modules == {"0": model[0]}
    assert model[0]._parameters == {"weight": model[0].weight, "bias": model[0].bias}


def test_buffers_and_non_persistent_buffers_set() -> None:
    """All that a module keeps of what it is made of, beside its modules and parameters."""
    module = nn.Module()
    module.register_buffer("one", torch.ones(1))
    module.register_buffer("other", torch.ones(1), persistent=False)
    assert list(module._buffers) == ["one", "other"]
    assert module._non_persistent_buffers_set == {"other"}
    empty = {"_modules", "_parameters", "_buffers"}
    assert {
        name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hook" not in name
    } == empty


def test_replicate_for_data_parallel() -> None:
    """`nn.DataParallel` copies a module by it."""
    assert nn.Linear(2, 2)._replicate_for_data_parallel()._is_replica


def test_cdata() -> None:
    """What a deep copy of a tensor asks for in the memo: the number of its storage."""
    tensor = torch.ones(2)
    storage = tensor.untyped_storage()
    copied = copy.deepcopy(tensor, {"torch": {storage._cdata: storage}})
    assert copied is not tensor
    assert copied.data_ptr() == tensor.data_ptr()


def test_dynamo_marked_constant() -> None:
    """The mark that `assume_constant_result` sets."""

    def function() -> bool:
        return True

    assert torch.compiler.assume_constant_result(function)._dynamo_marked_constant


def test_disable_dynamo() -> None:
    """`torch.compiler.disable`, without importing the compiler."""
    function = torch._disable_dynamo(torch.compiler.is_compiling)
    assert torch.compile(lambda x: x + function(), backend="eager")(torch.zeros(1)) == 0


def names_in(path: Path) -> set[str]:
    """Attributes, texts, imported names and methods of a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case (
                ast.Attribute(attr=name)
                | ast.FunctionDef(name=name)
                | ast.alias(name=name)
                | ast.Constant(value=str(name))
            ):
                found.add(name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_leant_on_where_this_says(name: str) -> None:
    assert name in names_in(SOURCES / NAMES[name])


def test_every_name_has_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8").partition("def test_sample")[2]
    assert [name for name in NAMES if name not in tests and f"def test{name}(" not in tests] == []
