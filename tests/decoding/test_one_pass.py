"""Routers of the layers, and those that read nothing: one pass, whoever runs it and with whichever cache."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from loramix import TwoPassCache, XLoraConfig, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.passes.cache import FollowedCache
from support.generation import MODES, NEW, generated, recomputed
from support.mixtures import logits_of
from support.tiny import ARCHITECTURES, gemma3, llama, tokens
from support.versions import is_older

Experts = Callable[[str], dict[str, str]]
KINDS = ("static", "arrow", "norm", "linear", "evidence")
every_kind = pytest.mark.parametrize("kind", KINDS)
GATING: dict[str, Any] = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}


def mixture(kind: str, experts: Experts, architecture: str = "llama", base: Any = None) -> Any:
    """Its router is far from its start."""
    layerwise = {"layerwise_scalings": True} if kind == "static" else {}
    config = XLoraConfig(adapters=experts(architecture), router=kind, **layerwise, **GATING)
    model: Any = get_peft_model(base or ARCHITECTURES[architecture](), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def forwards_of(model: Any) -> list[int]:
    """The tokens of each call of the first block, from now on."""
    seen: list[int] = []
    block = model.get_submodule(next(name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)))[0]
    block.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[:2].numel()))
    return seen


@every_kind
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_recomputed(kind: str, architecture: str, mode: str, experts: Experts) -> None:
    if mode == "prompt lookup" and is_older(5, 18):
        pytest.skip("transformers before 5.18: prompt lookup needs an end token")
    if mode == "prefill in chunks" and architecture == "gemma3" and is_older(5, 8):
        pytest.skip("transformers before 5.8: a text is not read in chunks without a cache of the user")
    model, base = mixture(kind, experts, architecture), ARCHITECTURES[architecture]()
    inputs = MODES[mode](base)
    found = generated(model, **inputs, return_dict_in_generate=True)
    assert not isinstance(found.past_key_values, TwoPassCache)
    assert torch.equal(found.sequences, recomputed(model, **inputs))
    assert not torch.equal(found.sequences, recomputed(base, **inputs))


@every_kind
def test_a_token_is_one_forward_and_no_lockstep_starts(kind: str, experts: Experts) -> None:
    model = mixture(kind, experts)
    seen = forwards_of(model)
    generated(model, input_ids=tokens(1))
    assert seen == [9] + [1] * (NEW - 1)
    assert model.lockstep_report.drafts == 0
    assert "one pass" in model.lockstep_report.reason


@every_kind
@pytest.mark.parametrize("lockstep", [True, 3, "lookup"])
def test_lockstep_has_no_effect_and_says_so_once(
    kind: str, lockstep: Any, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramix.model.generation._warned", set())
    model = mixture(kind, experts)
    expected, seen = generated(model, input_ids=tokens()), forwards_of(model)
    with pytest.warns(UserWarning, match=r"lockstep=.* has no effect: .*one pass"):
        assert torch.equal(generated(model, input_ids=tokens(), lockstep=lockstep), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated(model, input_ids=tokens(), lockstep=lockstep)
    assert len(seen) == 2 * NEW


@every_kind
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "top_k": 1}])
def test_assisted_generation_writes_the_same_tokens(kind: str, how: dict[str, Any], experts: Experts) -> None:
    model = mixture(kind, experts)
    end = {"eos_token_id": 95, "pad_token_id": 0}
    expected = generated(model, input_ids=tokens(1), **end)
    assert torch.equal(generated(model, input_ids=tokens(1), assistant_model=llama(), **how, **end), expected)
    helped = llama()
    assert torch.equal(
        generated(helped, input_ids=tokens(1), assistant_model=model, **end), generated(llama(), input_ids=tokens(1))
    )


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
    "without a configuration": lambda model: DynamicCache(),
}


@every_kind
@pytest.mark.parametrize("make", [llama, gemma3], ids=["llama", "sliding window"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_given_cache_stays_the_users_and_serves_several_turns(
    cache: str, make: Callable[[], Any], kind: str, experts: Experts
) -> None:
    model = mixture(kind, experts, make.__name__)
    mine, text = CACHES[cache](model), tokens(1)
    for turn in range(3):
        whole = recomputed(model, input_ids=text, max_new_tokens=3)
        text = generated(model, input_ids=text, past_key_values=mine, max_new_tokens=3)
        assert torch.equal(text, whole)
        assert mine.get_seq_length() == text.shape[1] - 1
        text = torch.cat([text, tokens(1, 3, seed=10 + turn)], dim=1)
    assert isinstance(mine, FollowedCache) if kind == "evidence" else type(mine) in (DynamicCache, StaticCache)


@every_kind
def test_a_cache_is_copied_cropped_and_reordered(kind: str, experts: Experts) -> None:
    model, more = mixture(kind, experts), tokens(2, 3, seed=6)
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        found = model(more, past_key_values=cache).logits
        assert_close(found, logits_of(model, torch.cat([tokens(), more], 1))[:, 9:], atol=1e-5, rtol=1e-5)
        twin.crop(-4)
        twin.reorder_cache(torch.tensor([1, 0]))
        found = model(more, past_key_values=twin).logits
    text = torch.cat([tokens()[[1, 0], :5], more], 1)
    assert_close(found, logits_of(model, text)[:, 5:], atol=1e-5, rtol=1e-5)


@every_kind
def test_a_quantised_cache_holds_what_it_holds_for_a_plain_model(kind: str, experts: Experts) -> None:
    """The keys and values that it was given are those of the mixture, and it is asked as often as a plain model's."""
    kinds: Any = transformers.cache_utils
    if not hasattr(kinds, "Fp8QuantizedLayer"):
        pytest.skip("transformers has no quantised cache that needs no other package")
    model = mixture(kind, experts)
    given = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    found = generated(model, input_ids=tokens(), **given, return_dict_in_generate=True, output_logits=True)
    assert isinstance(found.past_key_values, kinds.QuantizedCache)
    exact = logits_of(model, found.sequences, use_cache=False)[:, 8:-1]
    assert (torch.stack(found.logits, 1) - exact).abs().max() < 0.3
    assert_close(found.logits[0], exact[:, 0], atol=1e-4, rtol=1e-4)


@every_kind
def test_gradients_through_checkpointed_blocks_are_the_same(kind: str, experts: Experts) -> None:
    """Of the input too: a router that is made from the experts has no parameters."""
    found = []
    for checkpointing in (False, True):
        model = mixture(kind, experts)
        if checkpointing:
            enable_checkpointing(model)
        embedded = llama().get_input_embeddings()(tokens()).detach().requires_grad_()
        model.train()
        model(inputs_embeds=embedded, labels=tokens()).loss.backward()
        found.append([embedded.grad, *(p.grad for p in model.router.parameters())])
    assert len(found[0]) == 1 + len(list(model.router.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in found[0])
    assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


class PackedLinear(nn.Module):
    """A linear layer of eight bits, as quantisers make it: its sizes and a forward, without a weight in its shape."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("packed", (layer.weight.detach() / scale).round().to(torch.int8).flatten())
        self.register_buffer("scale", scale)

    packed: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        return (self.packed.float() * self.scale).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x))


@every_kind
def test_a_quantised_base_is_mixed_as_the_weights_that_it_computes_with(kind: str, experts: Experts) -> None:
    quantised, plain = llama(), llama()
    for path, layer in [(p, m) for p, m in quantised.named_modules() if type(m) is nn.Linear and p != "lm_head"]:
        packed = PackedLinear(layer)
        quantised.set_submodule(path, packed)
        plain.get_submodule(path).weight.data.copy_(packed.dense())
    model, same = mixture(kind, experts, base=quantised), mixture(kind, experts, base=plain)
    assert_close(logits_of(model), logits_of(same), atol=1e-5, rtol=1e-5)
    assert torch.equal(generated(model, input_ids=tokens()), generated(same, input_ids=tokens()))


CODE = """
import copy
import sys

import torch
from torch.testing import assert_close
from transformers import StaticCache

from loramix import XLoraConfig, get_peft_model
from support.tiny import llama, tokens

kind, *folders = sys.argv[1:]
adapters = {str(number): folder for number, folder in enumerate(folders)}
model = get_peft_model(llama(), XLoraConfig(adapters=adapters, router=kind, top_k_lora=2)).eval()
torch.manual_seed(3)
for parameter in model.router.parameters():
    parameter.data.add_(torch.randn_like(parameter))
compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
with torch.no_grad():
    assert_close(compiled(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens(), past_key_values=cache, use_cache=True)
    other = copy.deepcopy(cache)
    for seed in range(2):
        token = tokens(2, 1, seed=seed)
        expected = model(token, past_key_values=other, use_cache=True).logits
        assert_close(compiled(token, past_key_values=cache, use_cache=True).logits, expected)
    assert int(cache.get_seq_length()) == 11
model.train()
for net in (model, compiled):
    net(tokens(), labels=tokens(), use_cache=False).loss.backward() if model.router.trains else None
"""


@pytest.mark.slow
@every_kind
def test_a_forward_and_a_decode_step_are_one_graph(kind: str, experts: Experts) -> None:
    command = [sys.executable, "-c", CODE, kind, *experts("llama").values()]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
