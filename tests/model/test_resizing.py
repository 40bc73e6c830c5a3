"""`resize_token_embeddings` on a mixture: earlier tokens as before, new ones as the base model has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import loramix
from loramix.layers.layer import XLoraLayer
from support.generation import generated, recomputed
from support.mixtures import logits_of, mixture
from support.tiny import gemma3, gpt2, llama, opt, save_expert, tokens
from support.versions import needs_transformers

TARGETS: dict[str, list[str]] = {
    "neither": ["q_proj"],
    "the embedding": ["q_proj", "embed_tokens"],
    "the head": ["q_proj", "lm_head"],
    "both": ["q_proj", "embed_tokens", "lm_head"],
}
V, MORE, FEWER = 96, 100, 90


def made(folder: Path, targets: list[str], base: Any, **config: Any) -> Any:
    plain = {} if config.get("use_dora") is None else {"use_dora": config["use_dora"]}
    experts = {
        name: save_expert(folder / name, base, seed=i, target_modules=targets, **plain)
        for i, name in enumerate(("math", "code"))
    }
    return mixture(experts, base=base, layerwise_scalings=True)


def resize(model: Any, size: int) -> Any:
    torch.manual_seed(2)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def new_ids() -> torch.Tensor:
    ids = tokens()
    ids[:, ::3] = torch.tensor([97, 98, 99])
    return ids


@pytest.mark.parametrize(
    "tied", [False, pytest.param(True, marks=needs_transformers(5, 8, "a tied head is resized apart from its experts"))]
)
@pytest.mark.parametrize("where", TARGETS)
def test_more_tokens(where: str, tied: bool, tmp_path: Path) -> None:
    base = lambda: llama(tie_word_embeddings=tied)  # noqa: E731
    model = made(tmp_path, TARGETS[where], base())
    expected = logits_of(model)
    assert resize(model, MORE).get_input_embeddings().num_embeddings == MORE
    got = logits_of(model)
    assert got.shape[-1] == MORE
    assert_close(got[..., :V], expected, atol=1e-6, rtol=1e-6)
    plain = resize(base(), MORE)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, new_ids()), logits_of(plain, new_ids()))
    for path in model.adapted_modules:
        layer = model.get_submodule(path)
        assert isinstance(layer, XLoraLayer)
        if layer.stack.is_embedding:
            assert not layer.stack.lora_A[V:].any()
    assert torch.equal(generated(model, input_ids=new_ids()), recomputed(model, input_ids=new_ids()))
    model.save_pretrained(tmp_path / "mixture")
    again: Any = loramix.PeftModel.from_pretrained(resize(base(), MORE), tmp_path / "mixture")
    assert torch.equal(logits_of(again, new_ids()), logits_of(model, new_ids()))
    assert torch.equal(logits_of(again.unload(), new_ids()), logits_of(plain, new_ids()))


@pytest.mark.parametrize("where", TARGETS)
def test_fewer_tokens(where: str, tmp_path: Path) -> None:
    model = made(tmp_path, TARGETS[where], llama())
    ids = tokens() % FEWER
    expected = logits_of(model, ids)
    assert_close(logits_of(resize(model, FEWER), ids), expected[..., :FEWER], atol=1e-6, rtol=1e-6)


def test_an_expert_of_the_head_with_dora(tmp_path: Path) -> None:
    """A new row has the magnitude of the base model's row: the expert leaves it as it is."""
    model = made(tmp_path, ["q_proj", "lm_head"], llama(), use_dora=True)
    expected = logits_of(model)
    got = logits_of(resize(model, MORE))
    assert_close(got[..., :V], expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        hidden: list[torch.Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        got = logits_of(model)
        handle.remove()
    assert_close(got[..., V:], hidden[0] @ model.lm_head.base_layer.weight[V:].T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [gemma3, opt, gpt2])
def test_other_architectures(make: Any, tmp_path: Path) -> None:
    targets = ["wte"] if make is gpt2 else ["v_proj", "embed_tokens"]
    model = made(tmp_path, targets, make())
    expected = logits_of(model)
    assert_close(logits_of(resize(model, MORE))[..., :V], expected, atol=1e-6, rtol=1e-6)


def test_a_backbone_and_one_expert(tmp_path: Path) -> None:
    folder = save_expert(tmp_path, llama(), target_modules=["embed_tokens", "lm_head"])
    model: Any = loramix.PeftModel.from_pretrained(llama(), folder)
    expected = logits_of(model)
    assert_close(logits_of(resize(model, MORE))[..., :V], expected, atol=1e-6, rtol=1e-6)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    inner = made(tmp_path / "inner", ["embed_tokens"], llama().model)
    hidden = inner(tokens()).last_hidden_state
    assert torch.equal(resize(inner, MORE)(tokens()).last_hidden_state, hidden)


def test_a_size_that_cannot_be_leaves_the_experts_in_place(tmp_path: Path) -> None:
    model = made(tmp_path, TARGETS["both"], llama())
    expected = logits_of(model)
    with pytest.raises(Exception, match=r"."):
        model.resize_token_embeddings("many")
    assert torch.equal(logits_of(model), expected)


def test_trainable_experts_stay_trainable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = loramix.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    model: Any = resize(loramix.get_peft_model(llama(), config), MORE)
    model(new_ids(), labels=new_ids()).loss.backward()
    assert model.model.embed_tokens.stack.lora_A.grad[V:].any()
    assert model.lm_head.stack.lora_B.grad[V:].any()
