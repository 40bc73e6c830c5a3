"""Experts of lm_head: gated as every other layer, by the scalings of the tokens that go on to the head."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close
from transformers.modeling_outputs import CausalLMOutput

import loramix
from loramix.errors import RoutingError, UnsupportedAdapterError
from support.generation import ROUTING, generated, recomputed, report_of
from support.mixtures import SPARSE, far, logits_of
from support.peft_side import PEFT_WARNINGS, lora, ours, xlora
from support.tiny import ARCHITECTURES, GATED, TARGETS, build, gemma3, gpt2, llama, tokens

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS, "ignore:fan_in_fan_out is set to:UserWarning")

BASES: dict[str, Callable[[], Any]] = {
    **ARCHITECTURES,
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
}


def targets(name: str) -> list[str]:
    return TARGETS[name.partition(",")[0]]


def write(folder: Path, name: str, seed: int, **config: Any) -> str:
    """An expert as PEFT saves it, without the embeddings' weights, which its own X-LoRA does not read."""
    layers = {"target_modules": [*targets(name)[:2], "lm_head"], "fan_in_fan_out": False, **config}
    base = BASES[name]()
    torch.manual_seed(seed)
    settings = {"r": 2 + seed, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **layers}
    peft.get_peft_model(base, peft.LoraConfig(**settings)).save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Two experts with the head, and one without."""
    made: dict[str, list[str]] = {}

    def of(name: str) -> list[str]:
        if name not in made:
            root = tmp_path_factory.mktemp("experts")
            others: list[dict[str, Any]] = [{}, {}, {"target_modules": targets(name)[:1]}]
            made[name] = [write(root / str(i), name, seed=i, **config) for i, config in enumerate(others)]
        return made[name]

    return of


@pytest.fixture
def _peft_finds_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's X-LoRA looks for every module below `model.model`, where no head is; what it computes is its own."""
    module = importlib.import_module("peft.tuners.xlora.model")
    put = module.set_peft_model_state_dict

    def renamed(model: Any, tensors: dict[str, Any], **options: Any) -> Any:
        right = {key.replace("model.model.lm_head", "model.lm_head"): tensor for key, tensor in tensors.items()}
        return put(model, right, **options)

    monkeypatch.setattr(module, "set_peft_model_state_dict", renamed)


def mixed(folders: Callable[[str], list[str]], name: str = "llama", **config: Any) -> Any:
    torch.manual_seed(4)
    model = ours(BASES[name](), folders(name), **config)
    with torch.no_grad():
        model.internal_xlora_classifier.layers[-1].weight.mul_(5.0)
    return model


@pytest.mark.parametrize("config", [{}, {"layerwise_scalings": True}, SPARSE], ids=["shared", "layerwise", "sparse"])
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma3", "qwen3"])
@pytest.mark.usefixtures("_peft_finds_the_head")
def test_logits_and_scalings_equal_pefts(name: str, config: dict[str, Any], folders: Any) -> None:
    experts, base = folders(name), BASES[name]
    theirs = xlora(base(), experts, **config)
    model = ours(base(), experts, like=theirs, **config)
    assert model.adapted_modules[-1] == "lm_head"
    assert_close(logits_of(model), logits_of(theirs), atol=1e-4, rtol=1e-4)
    assert_close(model.get_latest_scalings(), theirs.internal_xlora_scalings, atol=1e-5, rtol=1e-5)
    without = logits_of(model)
    with torch.no_grad():
        model.lm_head.stack.lora_B.zero_()
    assert far(logits_of(model), without)


@pytest.mark.usefixtures("_peft_finds_the_head")
def test_gradients_equal_pefts(folders: Any) -> None:
    """The loss reaches the router through the head too."""
    config = {"layerwise_scalings": True}
    theirs = xlora(BASES["llama"](), folders("llama"), **config)
    model = ours(BASES["llama"](), folders("llama"), like=theirs, **config)
    gradients = []
    for each in (model, theirs):
        each(input_ids=tokens(), labels=tokens()).loss.backward()
        router = each.internal_xlora_classifier if each is model else each.base_model.internal_xlora_classifier
        gradients.append(router.layers[-1].weight.grad)
    assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert gradients[0].view(-1, 3, 64)[-1].abs().max() > 0


@pytest.mark.parametrize("name", BASES)
def test_one_expert_alone_equals_plain_lora(name: str, folders: Any) -> None:
    model = mixed(folders, name)
    for i, folder in enumerate(folders(name)):
        with model.fixed_scalings([float(j == i) for j in range(3)]):
            assert_close(logits_of(model), logits_of(lora(BASES[name](), folder).eval()), atol=1e-5, rtol=1e-5)
    single: Any = loramix.PeftModel.from_pretrained(BASES[name](), folders(name)[0])
    assert_close(logits_of(single), logits_of(lora(BASES[name](), folders(name)[0]).eval()), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(BASES[name]()))


@pytest.mark.parametrize("kept", [1, 4, 9, 20, torch.tensor([2, 5, 3])], ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_the_tokens_that_are_kept_have_their_own_scalings(kept: Any, layerwise: bool, folders: Any) -> None:
    model = mixed(folders, layerwise_scalings=layerwise)
    whole = logits_of(model)
    rows = kept if isinstance(kept, torch.Tensor) else slice(-kept, None)
    assert_close(logits_of(model, logits_to_keep=kept), whole[:, rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("lockstep", [False, True, 3, "lookup", None], ids=str)
def test_every_decoding_gives_the_tokens_of_recomputing(name: str, lockstep: Any, folders: Any) -> None:
    model = mixed(folders, name, **ROUTING)
    for inputs in ({"input_ids": tokens(1)}, {"input_ids": tokens(3)}):
        expected = recomputed(model, **inputs)
        assert torch.equal(generated(model, lockstep=lockstep, **inputs), expected)
    assert lockstep is False or report_of(model).reason is None
    assert not torch.equal(expected, recomputed(BASES[name](), **inputs))


def test_beams_and_padding(folders: Any) -> None:
    model = mixed(folders, **ROUTING)
    for inputs in (
        {"input_ids": tokens(), "num_beams": 3},
        {"input_ids": tokens(), "attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])},
    ):
        assert torch.equal(generated(model, **inputs), recomputed(model, **inputs))


def test_files_merging_and_unloading(folders: Any, tmp_path: Path) -> None:
    for name in ("llama", "llama, tied"):
        model = mixed(folders, name, layerwise_scalings=True)
        expected = logits_of(model)
        model.save_pretrained(tmp_path / name)
        again: Any = loramix.PeftModel.from_pretrained(BASES[name](), tmp_path / name)
        assert torch.equal(logits_of(again), expected)
        assert torch.equal(logits_of(again.unload()), logits_of(BASES[name]()))
        model.tie_weights()
        assert torch.equal(logits_of(model), expected)
        with model.fixed_scalings([0.3, 0.5, 0.2]):
            fixed = logits_of(model)
            assert_close(logits_of(model.merge_and_unload()), fixed, atol=1e-4, rtol=1e-4)


def test_an_expert_of_the_head_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", seed=0, target_modules=["lm_head"])
    model = ours(BASES["llama"](), [folder])
    with model.fixed_scalings([1.0]):
        assert_close(logits_of(model), logits_of(lora(BASES["llama"](), folder).eval()), atol=1e-5, rtol=1e-5)
    assert torch.equal(generated(model, input_ids=tokens()), recomputed(model, input_ids=tokens()))


def test_a_static_router_reaches_the_head(folders: Any) -> None:
    adapters = dict(zip("abc", folders("llama"), strict=True))
    config = loramix.XLoraConfig(adapters=adapters, router="static", layerwise_scalings=True)
    model: Any = loramix.get_peft_model(BASES["llama"](), config).eval()
    with torch.no_grad():
        for parameter in model.internal_xlora_router.parameters():
            parameter.copy_(torch.randn_like(parameter) * 3)
    routed = logits_of(model)
    with model.fixed_scalings(model.get_latest_scalings()[0, 0]):
        assert_close(logits_of(model), routed, atol=1e-5, rtol=1e-5)
    assert torch.equal(generated(model, input_ids=tokens()), recomputed(model, input_ids=tokens()))


def test_backbone_and_head_on_their_own_are_refused(folders: Any) -> None:
    """The head would have to guess whose tokens it sees."""
    model = mixed(folders)
    hidden = model.model(tokens()).last_hidden_state
    with pytest.raises(RoutingError, match="only inside the passes"):
        model.lm_head(hidden)


class ReadsItsHead(transformers.LlamaForCausalLM):
    """A forward that multiplies with the head's weight instead of calling the head."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return CausalLMOutput(logits=F.linear(self.model(input_ids).last_hidden_state, self.lm_head.weight))


class FusesItsLoss(transformers.LlamaForCausalLM):
    """The same, but only with labels, as a fused loss does."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        call = super().forward if labels is None else functools.partial(ReadsItsHead.forward, self)
        return call(input_ids, **kwargs)


def test_a_head_whose_weight_is_read_instead_is_refused(folders: Any) -> None:
    base = build(ReadsItsHead, **GATED)
    with pytest.raises(UnsupportedAdapterError, match=r"'lm_head' is not called: the base model reads its weight"):
        ours(base, folders("llama"))
    model = ours(build(FusesItsLoss, **GATED), folders("llama"))
    assert torch.equal(logits_of(model), logits_of(ours(BASES["llama"](), folders("llama"))))
    with pytest.raises(RoutingError, match=r"did not call 'lm_head'"):
        model(tokens(), labels=tokens())
    with model.disable_adapter():
        assert_close(model(tokens(), labels=tokens()).logits, BASES["llama"]()(tokens()).logits)


def test_gpt2_and_gemma_name_their_head_too() -> None:
    for make in (gpt2, gemma3):
        config = loramix.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        model: Any = loramix.get_peft_model(make(), config)
        assert far(logits_of(model.eval()), logits_of(make()))
