"""Backbones that drop tokens before their last blocks: these are mixed by the scalings of the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

import loramix
from loramix import RoutingError
from support.generation import PADDING, ROUTING, generated, ids_with_padding, recomputed, report_of
from support.mixtures import logits_of, mixture
from support.tiny import GATED, HIDDEN, build, llama, save_expert, tokens
from support.versions import needs_transformers

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


class DroppingModel(hf.LlamaModel):
    """Before its last block it drops the tokens that the head does not need."""

    def forward(self, input_ids: Tensor, *, logits_to_keep: int | Tensor = 0, **kwargs: Any) -> Any:
        def drop(x: Tensor) -> Tensor:
            if isinstance(logits_to_keep, int):
                return x[:, -logits_to_keep:]
            if logits_to_keep.dim() == 1:
                return x[:, logits_to_keep]
            if logits_to_keep.dtype == torch.bool:
                return x[logits_to_keep]
            return torch.take_along_dim(x, logits_to_keep[..., None], 1)

        out = super().forward(input_ids, **kwargs)
        out.last_hidden_state = self.last_mlp(drop(out.last_hidden_state))
        return out


class DroppingForCausalLM(hf.LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DroppingModel(config)
        self.model.last_mlp = hf.models.llama.modeling_llama.LlamaMLP(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        out = self.model(input_ids, **given, **kwargs)
        logits = self.lm_head(out.last_hidden_state)
        return hf.modeling_outputs.CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


def dropping() -> Any:
    return build(DroppingForCausalLM, **GATED)


def gemma4(**changes: Any) -> Any:
    """Later blocks read the keys and values of earlier ones, so they compute the kept tokens alone."""
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 16, "global_head_dim": 16}
    sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "sliding_window": 4}
    types = ["sliding_attention", "full_attention"] * 2
    return build(hf.Gemma4ForCausalLM, **{**GATED, **sizes, "layer_types": types, **changes})


BASES: dict[str, Callable[[], Any]] = {
    "dropping": dropping,
    "gemma4": gemma4,
    "gemma4 with sparse blocks": lambda: gemma4(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32
    ),
}
NEW = needs_transformers(5, 23, "Gemma 4 drops no tokens, or is not there")


@pytest.fixture(params=["dropping", *(pytest.param(name, marks=NEW) for name in BASES if name != "dropping")])
def base(request: pytest.FixtureRequest) -> Any:
    return BASES[request.param]


def experts_of(base: Callable[[], Any], folder: Path, **config: Any) -> dict[str, str]:
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    return {
        name: save_expert(folder / name, base(), seed=seed, target_modules=targets, **config)
        for seed, name in enumerate(("math", "code", "prose"))
    }


@pytest.fixture
def model(base: Callable[[], Any], tmp_path: Path) -> Any:
    return mixture(experts_of(base, tmp_path), base=base(), **ROUTING)


INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "positions": lambda ids: torch.tensor([6, 2, 2]),
    "positions of each text": lambda ids: torch.tensor([[1, 8], [4, 0]]),
    "a mask": lambda ids: ids % 3 == 0,
}


@pytest.mark.parametrize("keep", [1, 3, 9, 20])
def test_the_last_tokens(model: Any, keep: int) -> None:
    assert_close(logits_of(model, logits_to_keep=keep), logits_of(model)[:, -keep:], **TOLERANCE)
    assert model.get_latest_scalings().shape[:2] == (2, 9)


@pytest.mark.parametrize("index", INDICES)
def test_tokens_by_index(model: Any, index: str) -> None:
    keep = INDICES[index](tokens())
    every = logits_of(model)
    expected = torch.take_along_dim(every, keep[..., None], 1) if index == "positions of each text" else None
    expected = expected if expected is not None else every[keep] if keep.dtype == torch.bool else every[:, keep]
    assert_close(logits_of(model, logits_to_keep=keep), expected, **TOLERANCE)


def test_as_many_tokens_in_another_order_are_refused(tmp_path: Path) -> None:
    model = mixture(experts_of(dropping, tmp_path), base=dropping(), **ROUTING)
    assert_close(logits_of(model, logits_to_keep=torch.arange(9)), logits_of(model), **TOLERANCE)
    with pytest.raises(RoutingError, match="in their order"):
        logits_of(model, logits_to_keep=torch.arange(9).flip(0))


@pytest.mark.parametrize("keep", [1, 2])
def test_with_a_cache_and_in_parts(model: Any, keep: int) -> None:
    ids, cache = tokens(2, 12), DynamicCache(config=model.config)
    whole = logits_of(model, ids)
    for start, end in ((0, 5), (5, 9), (9, 10), (10, 12)):
        found = logits_of(model, ids[:, start:end], past_key_values=cache, logits_to_keep=keep)
        assert_close(found, whole[:, start:end][:, -keep:], **TOLERANCE)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": tokens(2)},
        {"input_ids": tokens(2), "num_beams": 3},
        {"input_ids": ids_with_padding(), "attention_mask": PADDING},
        {"input_ids": tokens(2), "prefill_chunk_size": 4},
        {"input_ids": tokens(1, 1)},
    ],
    ids=["greedy", "beams", "left padding", "in chunks", "one token"],
)
def test_generation(model: Any, inputs: dict[str, Any]) -> None:
    assert torch.equal(generated(model, **inputs), recomputed(model, **inputs))


@pytest.mark.parametrize("lockstep", [True, 3, "lookup"])
def test_generation_with_drafts(tmp_path: Path, lockstep: Any) -> None:
    model = mixture(experts_of(dropping, tmp_path), base=dropping(), **ROUTING)
    found = generated(model, input_ids=tokens(), lockstep=lockstep)
    assert report_of(model).reason is None
    assert torch.equal(found, recomputed(model, input_ids=tokens()))


def test_generation_is_greedy_over_whole_forwards(model: Any) -> None:
    ids = tokens()
    for _ in range(8):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated(model, input_ids=tokens()), ids)


def test_gradients_reach_the_router(model: Any) -> None:
    gradients = []
    for loss in (lambda: model(tokens(), logits_to_keep=2).logits, lambda: model(tokens()).logits[:, -2:]):
        model.zero_grad()
        loss().square().sum().backward()
        gradients.append([p.grad.clone() for p in model.internal_xlora_classifier.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layerwise", [False, True])
def test_shared_scalings_and_dora(base: Callable[[], Any], tmp_path: Path, layerwise: bool) -> None:
    experts = experts_of(base, tmp_path, use_dora=True)
    model = mixture(experts, base=base(), layerwise_scalings=layerwise)
    assert_close(logits_of(model, logits_to_keep=2), logits_of(model)[:, -2:], **TOLERANCE)


@pytest.mark.parametrize("router", ["static", "test-energy"])
def test_one_pass(base: Callable[[], Any], tmp_path: Path, router: str) -> None:
    if router != "static":
        import support.routers  # noqa: F401 - registers a layer router
    config = loramix.XLoraConfig(adapters=experts_of(base, tmp_path), router=router, hidden_size=HIDDEN)
    model: Any = loramix.get_peft_model(base(), config).eval()
    assert_close(logits_of(model, logits_to_keep=2)[:, -2:], logits_of(model)[:, -2:], **TOLERANCE)
    assert model.get_latest_scalings().shape[:2] == (2, 9)
    assert model.get_latest_scalings().isfinite().all()


def test_usual_backbones_are_mixed_as_before(experts: Callable[[str], dict[str, str]]) -> None:
    model = mixture(experts("llama"), base=llama(), **ROUTING)
    assert_close(logits_of(model, logits_to_keep=2), logits_of(model)[:, -2:], **TOLERANCE)
