"""Layers that the router cannot scale, as those of a vision tower and a projector: they take given scalings.

B, S: batch, sequence.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.testing import assert_close

from loramix import PeftModel, XLoraConfig, errors, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.evaluation.ablation import without_expert
from loramix.formats import load_adapter
from loramix.training import ScalingPassCache
from support.mixtures import far, mixture
from support.peft_side import PEFT_WARNINGS, lora, write_expert
from support.tiny import GATED, build, tokens

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
IMAGE = 95
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TARGETS = ["q_proj", "v_proj", "fc1", "linear_1"]
SCALINGS: dict[str, Any] = {"vision_tower": {"a": 0.25, "b": 1.5}, "multi_modal_projector": "uniform"}

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)


def base() -> Any:
    text = {**GATED, "model_type": "llama"}
    vision = {**VISION, "model_type": "clip_vision_model"}
    model = build(hf.LlavaForConditionalGeneration, text_config=text, vision_config=vision, image_token_index=IMAGE)
    model.config.image_token_id = IMAGE
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The experts a and b, of PEFT, on tower, projector and language model."""
    root = tmp_path_factory.mktemp("experts")
    return {one: write_expert(root / one, base(), seed=i, target_modules=TARGETS) for i, one in enumerate("ab")}


def make(folders: dict[str, str], **config: Any) -> Any:
    torch.manual_seed(3)
    settings = {"hidden_size": 64, "layerwise_scalings": True, "elsewhere": SCALINGS, **config}
    model: Any = get_peft_model(base(), XLoraConfig(adapters=folders, **settings)).eval()
    if settings.get("router") is None:
        with torch.no_grad():
            for parameter in model.router.parameters():
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def inputs() -> dict[str, Tensor]:
    ids = tokens(2, 9)
    ids[:, 1:5] = IMAGE  # 2 x 2 patches
    ids[:, 5:].clamp_(max=IMAGE - 1)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits_of(model: Any, **more: Any) -> Tensor:
    return model(**inputs(), **more).logits


@torch.no_grad()
def reference(model: Any, folders: dict[str, str]) -> Tensor:
    """A forward of the plain base model, with one expert at a time added to each layer by a hook."""
    logits_of(model)
    plain, scalings = base(), model.get_latest_scalings()
    experts = [load_adapter(name, folder) for name, folder in folders.items()]
    given = {"vision_tower": [0.25, 1.5], "multi_modal_projector": [0.5, 0.5]}
    for number, path in enumerate(model.adapted_modules):
        own = next((torch.tensor(s) for part, s in given.items() if part in path), scalings[:, :, number])

        def add(layer: Any, args: Any, y: Tensor, own: Tensor = own, path: str = path) -> Tensor:
            for e, expert in enumerate(experts):
                A, B = expert.weights[path].A, expert.weights[path].B
                y = y + own[..., e, None] * expert.scaling(path) * (args[0] @ A.T @ B.T)
            return y

        plain.get_submodule(path).register_forward_hook(add)
    return logits_of(plain)


def test_a_forward_equals_the_reference(folders: dict[str, str]) -> None:
    model = make(folders)
    parts = {part for path in model.adapted_modules for part in (*SCALINGS, "language_model") if part in path}
    assert parts == {*SCALINGS, "language_model"}
    assert_close(logits_of(model), reference(model, folders), **CLOSE)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(base()))


def test_cached_generation_equals_uncached(folders: dict[str, str]) -> None:
    model = make(folders)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        settings["num_beams"] = beams
        cached, whole = (model.generate(**inputs(), use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, whole)


def test_saved_copied_pickled_and_renamed(folders: dict[str, str], tmp_path: Path) -> None:
    model = make(folders)
    model.save_pretrained(tmp_path)
    pickled = pickle.dumps(model)  # before a forward: transformers then leaves hooks that cannot be
    expected = logits_of(model)
    for other in (
        PeftModel.from_pretrained(base(), tmp_path),
        PeftModel.from_pretrained(base(), tmp_path, adapters={"c": folders["a"], "d": folders["b"]}),
        copy.deepcopy(model),
        pickle.loads(pickled),
    ):
        assert torch.equal(logits_of(other), expected)
    other.active_peft_config.elsewhere["vision_tower"] = "uniform"  # a copy of its own
    assert far(logits_of(other), expected)
    assert torch.equal(logits_of(model), expected)


def test_one_expert_alone_equals_peft(folders: dict[str, str]) -> None:
    alone: Any = PeftModel.from_pretrained(base(), folders["a"]).eval()
    expected = logits_of(lora(base(), folders["a"]))
    assert_close(logits_of(alone), expected, **CLOSE)
    mixture = make(folders)
    with mixture.fixed_scalings([1.0, 0.0]):
        assert_close(logits_of(mixture), expected, **CLOSE)
    assert_close(logits_of(alone.merge_and_unload()), expected, **CLOSE)


def test_static_needs_no_given_scalings(folders: dict[str, str]) -> None:
    model = make(folders, router="static", elsewhere={}, layerwise_scalings=False)
    with torch.no_grad():
        next(iter(model.router.parameters())).copy_(torch.tensor([[0.3, -0.4]]))
    found = logits_of(model)
    with model.fixed_scalings(torch.tensor([0.3, -0.4]).softmax(0)):
        assert_close(logits_of(model), found, **CLOSE)
    model.train()
    model(**inputs()).logits.square().mean().backward()
    assert next(iter(model.router.parameters())).grad.abs().max() > 0


@pytest.mark.parametrize(
    ("elsewhere", "error", "named"),
    [
        ({}, errors.UnsupportedAdapterError, r"elsewhere=.*uniform"),
        ({"vision_tower": "uniform"}, errors.UnsupportedAdapterError, "multi_modal_projector"),
        ({**SCALINGS, "audio_tower": "uniform"}, errors.ConfigurationError, "audio_tower"),
        ({"vision_tower": {"c": 1.0}}, errors.ConfigurationError, "'c'"),
        ({"vision_tower": {"a": float("nan")}}, errors.ConfigurationError, "nan"),
        ({"vision_tower": "mean"}, errors.ConfigurationError, "mean"),
        (["vision_tower"], errors.ConfigurationError, "vision_tower"),
    ],
)
def test_what_cannot_be_is_refused(folders: dict[str, str], elsewhere: Any, error: type[Exception], named: str) -> None:
    model = base()
    kinds = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(error, match=named):
        get_peft_model(model, XLoraConfig(hidden_size=64, adapters=folders, elsewhere=elsewhere))
    assert {path: type(module) for path, module in model.named_modules()} == kinds


def test_routing_fixed_from_a_prompt_keeps_the_given_scalings(folders: dict[str, str]) -> None:
    model = make(folders)
    model.fix_routing(prompt=inputs())
    for number, path in enumerate(model.adapted_modules):
        if "vision_tower" in path:
            assert_close(model.fixed_routing[number], torch.tensor([0.25, 1.5]))


@pytest.mark.parametrize("lockstep", [True, 3, "lookup"])
def test_decoding_ahead_gives_such_layers_their_scalings_too(
    lockstep: Any, experts: Callable[[str], dict[str, str]]
) -> None:
    given = {"layers.0.mlp": {"math": 3.0}, "layers.1.self_attn": "uniform"}
    model = mixture(experts("llama"), layerwise_scalings=True, scaling_pass_value=0.3, elsewhere=given)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ahead, plain = (model.generate(tokens(), lockstep=how, **settings) for how in (lockstep, False))
    assert torch.equal(ahead.sequences, plain.sequences)
    assert_close(torch.stack(ahead.logits), torch.stack(plain.logits), **CLOSE)
    model.active_peft_config.elsewhere["layers.0.mlp"] = {}
    assert far(logits_of_text(model), plain.logits[0])
    model.active_peft_config.elsewhere = {}
    with pytest.raises(errors.ConfigurationError, match="keeps its entries"):
        logits_of_text(model)


def logits_of_text(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits[:, -1]


def test_recomputed_layers_have_the_scalings_of_their_forward(folders: dict[str, str]) -> None:
    """Those of a fixed routing, also when the backward comes after it."""
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = make(folders, use_trainable_adapters=True).train()
        if checkpointing:
            enable_checkpointing(model)
        with model.fixed_scalings([0.2, 0.7]):
            loss = model(**inputs()).logits.square().mean()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("vision_tower" in name for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("config", [{}, {"router": "static", "elsewhere": {}, "layerwise_scalings": False}])
def test_an_expert_that_is_left_out_does_not_act_anywhere(folders: dict[str, str], config: dict[str, Any]) -> None:
    model = make(folders, **config)
    outs: list[Tensor] = []
    tower = next(path for path in model.adapted_modules if "vision_tower" in path)
    layer = model.get_submodule(tower)
    layer.register_forward_hook(lambda _, args, y: outs.append(y - layer.base_layer(args[0])))
    with without_expert(model, "a"):
        logits_of(model)
    with model.fixed_scalings([0.0, 1.5 if not config else 1.0]):
        logits_of(model)
    assert_close(*outs, **CLOSE)


def test_a_scaling_pass_with_such_layers_is_cached_only_while_their_experts_are_frozen(
    experts: Callable[[str], dict[str, str]],
) -> None:
    given = {"layers.0.mlp": "uniform"}
    with pytest.raises(errors.UnsupportedOperationError, match="elsewhere"):
        ScalingPassCache(mixture(experts("llama"), elsewhere=given, use_trainable_adapters=True), max_bytes=2**20)
    model = mixture(experts("llama"), elsewhere=given, xlora_dropout_p=0.0)
    with ScalingPassCache(model, max_bytes=2**20) as cache, torch.no_grad():
        for _ in range(2):
            model(tokens(), use_cache=False)
        assert (cache.hits, cache.misses) == (1, 1)
        model.active_peft_config.elsewhere["layers.0.mlp"] = {"math": 2.0}
        model(tokens(), use_cache=False)
        assert (cache.hits, cache.misses) == (1, 2)


def bert() -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    return build(hf.BertForSequenceClassification, **sizes, intermediate_size=96, max_position_embeddings=32)


@pytest.mark.parametrize("part", ["pooler.dense", "classifier"])
def test_any_layer_by_name(part: str, tmp_path: Path) -> None:
    """Poolers and heads too."""
    settings = {"target_modules": ["query", part], "task_type": None}
    adapters = {one: write_expert(tmp_path / one, bert(), seed=i, **settings) for i, one in enumerate("ab")}
    config: dict[str, Any] = {"hidden_size": 64, "adapters": adapters}
    with pytest.raises(errors.UnsupportedAdapterError, match=part):
        get_peft_model(bert(), XLoraConfig(**config))
    model: Any = get_peft_model(bert(), XLoraConfig(elsewhere={part: {"a": 2.0}}, **config)).eval()
    path = next(path for path in model.adapted_modules if path.endswith(part))
    layer, seen = model.get_submodule(path), []
    layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(tokens())
        x, y = seen[-1]
        expert = load_adapter("a", adapters["a"])
        A, B = expert.weights[path].A, expert.weights[path].B
        assert_close(y, layer.base_layer(x) + 2.0 * expert.scaling(path) * (x @ A.T @ B.T), **CLOSE)
