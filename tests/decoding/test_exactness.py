"""What is generated with a cache is, token for token, what recomputing everything generates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.generation import MODES, NEW, generated, recomputed
from support.tiny import gemma3, llama, save_expert, tokens
from support.versions import is_older


@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_recomputed(model: Any, base: Any, mode: str) -> None:
    if mode == "prompt lookup" and is_older(5, 18):
        pytest.skip("transformers before 5.18: prompt lookup needs an end token")
    inputs = MODES[mode](base)
    found = generated(model, **inputs)
    assert found.shape[1] in (NEW, NEW + inputs.get("input_ids", tokens()).shape[1])
    assert torch.equal(found, recomputed(model, **inputs))
    assert not torch.equal(found, recomputed(base, **inputs))


def test_a_cache_is_in_use_by_default(model: Any) -> None:
    """Each of both passes reads the prompt once, and one token a step after that."""
    seen: list[int] = []
    layer = model.get_submodule(model.adapted_modules[0])
    handle = layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    generated(model, input_ids=tokens(1), lockstep=False)
    handle.remove()
    assert seen == [9, 9] + [1, 1] * (NEW - 1)


@pytest.mark.parametrize("make", [llama, gemma3], ids=["llama", "gemma3"])
def test_embeddings_as_input_pass_by_an_adapted_embedding(make: Callable[..., Any], tmp_path: Any) -> None:
    from support.mixtures import mixture

    experts = {
        name: save_expert(tmp_path / name, make(), seed=seed, target_modules=["embed_tokens", "v_proj"])
        for seed, name in enumerate(("math", "code"))
    }
    model = mixture(experts, base=make())
    inputs = {"inputs_embeds": make().get_input_embeddings()(tokens())}
    found = generated(model, **inputs)
    assert torch.equal(found, recomputed(model, **inputs))
    ids = {"input_ids": tokens()}
    assert torch.equal(generated(model, **ids), recomputed(model, **ids))
    assert not torch.equal(found, generated(model, **ids)[:, 9:])


def test_the_sliding_window_is_exceeded() -> None:
    assert gemma3().config.sliding_window < tokens().shape[1]


def test_generation_ends_at_the_end_token(model: Any) -> None:
    whole = generated(model, input_ids=tokens(1))[0]
    end = whole[9 + 3].item()
    found = generated(model, input_ids=tokens(1), eos_token_id=end)[0]
    assert torch.equal(found, whole[: len(found)])
    assert found[-1] == end


def test_rows_generate_as_they_do_alone(model: Any) -> None:
    together = generated(model, input_ids=tokens())
    assert torch.equal(together, torch.cat([generated(model, input_ids=row) for row in tokens().split(1)]))


def test_a_custom_logits_processor_is_heeded(model: Any) -> None:
    def shift(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(-1, (ids[:, -1:] + 1) % scores.shape[-1], 1e4)

    found = generated(model, input_ids=tokens(), logits_processor=[shift])
    expected = torch.stack([(tokens()[:, -1] + i) % 96 for i in range(1, NEW + 1)], dim=1)
    assert torch.equal(found[:, 9:], expected)


def test_generation_leaves_the_models_settings_alone(model: Any) -> None:
    before = model.generation_config.to_dict(), model.config.to_dict()
    generated(model, input_ids=tokens())
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before
