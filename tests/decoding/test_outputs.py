"""What `generate` and `forward` hand out beside tokens, one step at a time, disabled and with fixed scalings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from support.generation import generated
from support.tiny import tokens

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def test_the_record_has_the_base_models_shapes(model: Any, base: Any) -> None:
    asked = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True)
    settings = {"input_ids": tokens(), "max_new_tokens": 4, "return_dict_in_generate": True, **asked}
    for part in (model, base):
        part.set_attn_implementation("eager")
    found, expected = generated(model, **settings), generated(base, **settings)
    for part in (model, base):
        part.set_attn_implementation("sdpa")
    assert type(found) is type(expected)
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert shapes(found[name]) == shapes(expected[name])
        assert len(found[name]) == 4
    assert not torch.equal(found.logits[0], expected.logits[0])
    assert_close(found.logits[0], model(tokens()).logits[:, -1], **TOLERANCE)


def shapes(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else tuple(map(shapes, value))


@torch.no_grad()
def test_step_by_step_forwards_equal_one_forward_and_generate(model: Any) -> None:
    sequence = generated(model, input_ids=tokens())
    cache, logits = None, []
    for chunk in [sequence[:, :9], *sequence[:, 9:].split(1, dim=1)]:
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    found = torch.cat(logits, dim=1)
    assert_close(found, model(sequence).logits, **TOLERANCE)
    assert torch.equal(found[:, 8:-1].argmax(-1), sequence[:, 9:])


def test_disabled_it_generates_what_the_base_model_does(model: Any, base: Any) -> None:
    expected = generated(base, input_ids=tokens())
    with model.disable_adapter():
        assert torch.equal(generated(model, input_ids=tokens()), expected)
        assert torch.equal(
            generated(model, input_ids=tokens(), num_beams=2), generated(base, input_ids=tokens(), num_beams=2)
        )
    assert not torch.equal(generated(model, input_ids=tokens()), expected)


def test_disabled_a_cache_is_the_base_models_and_can_be_continued(model: Any, base: Any) -> None:
    with model.disable_adapter(), torch.no_grad():
        first = model(tokens()[:, :5], use_cache=True)
        second = model(tokens()[:, 5:], past_key_values=first.past_key_values).logits
    with torch.no_grad():
        assert_close(second, base(tokens()).logits[:, 5:], **TOLERANCE)


@pytest.mark.parametrize("scalings", [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1 / 3] * 3], ids=str)
def test_fixed_scalings_generate_in_one_pass(model: Any, scalings: list[float]) -> None:
    free = generated(model, input_ids=tokens())
    with model.fixed_scalings(scalings):
        cached = generated(model, input_ids=tokens())
        assert torch.equal(cached, generated(model, input_ids=tokens(), use_cache=False))
    assert not torch.equal(cached, free)
    assert torch.equal(generated(model, input_ids=tokens()), free)


def test_fixed_scalings_of_zero_are_the_base_model(model: Any, base: Any) -> None:
    with model.fixed_scalings([0.0, 0.0, 0.0]):
        assert torch.equal(generated(model, input_ids=tokens()), generated(base, input_ids=tokens()))


def test_fixed_scalings_equal_a_plain_lora_model(model: Any, experts: Any, architecture: str) -> None:
    from loramix import PeftModel
    from support.tiny import ARCHITECTURES

    for i, folder in enumerate(experts(architecture).values()):
        alone = PeftModel.from_pretrained(ARCHITECTURES[architecture](), folder)
        with model.fixed_scalings([float(i == e) for e in range(3)]):
            assert torch.equal(generated(model, input_ids=tokens()), generated(alone, input_ids=tokens()))


def test_the_latest_scalings_are_those_of_the_last_token(of_llama: Any) -> None:
    generated(of_llama, input_ids=tokens())
    assert of_llama.get_latest_scalings().shape == (2, 1, len(of_llama.adapted_modules), 3)
    generated(of_llama, input_ids=tokens(), use_cache=False)
    assert of_llama.get_latest_scalings().shape == (2, 16, len(of_llama.adapted_modules), 3)


def test_in_train_mode_generation_is_cached_too(of_llama: Any) -> None:
    expected = generated(of_llama, input_ids=tokens())
    of_llama.train()
    try:
        assert torch.equal(generated(of_llama, input_ids=tokens()), expected)
    finally:
        of_llama.eval()
