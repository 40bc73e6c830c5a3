"""No forward of the two passes waits for its device, as the capture of a CUDA graph asks.

On the device "meta" tensors have no values: whoever asks for one, or for a shape that follows from values, fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StaticCache

from loramix.passes.hooks import RoutingHook
from loramix.passes.state import attach
from support.mixtures import mixture
from support.versions import needs_transformers

MODES: dict[str, dict[str, Any]] = {
    "shared": {},
    "layerwise": {"layerwise_scalings": True},
    "sparse": {"top_k_lora": 2},
    "hard": {"top_k_lora": 1, "enable_softmax": False},
    "renormalised": {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
}
CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda _: None,
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}


@pytest.fixture
def valueless(experts: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A mixture on the device "meta", for which PyTorch has no autocast to switch off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return mixture(experts("llama"), **MODES[request.param]).to("meta")


@needs_transformers(5, 8, "rotary embeddings ask for an autocast that the device of this test lacks")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("valueless", MODES, indirect=True)
def test_prefill_and_decode_ask_for_no_value(cache: str, valueless: Any) -> None:
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    with torch.no_grad():
        read = valueless(input_ids=ids, use_cache=True, past_key_values=CACHES[cache](valueless))
        token = valueless(input_ids=ids[:, :1], past_key_values=read.past_key_values)
    assert token.logits.shape == (2, 1, valueless.config.vocab_size)


@pytest.mark.parametrize("valueless", ["shared"], indirect=True)
def test_whoever_asks_is_found_out(valueless: Any) -> None:
    class Asks(RoutingHook):
        def routed(self, output: Any) -> None:
            if bool(output.final.max() > 0.5):
                raise AssertionError

    detach = attach(valueless, Asks())
    with pytest.raises((RuntimeError, NotImplementedError)), torch.no_grad():
        valueless(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta"))
    detach()
