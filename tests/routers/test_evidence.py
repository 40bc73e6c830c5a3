"""The router of evidence: what the tokens so far say, gathered with forgetting."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from loramix import (
    CacheError,
    ConfigurationError,
    ModelError,
    RoutingError,
    UnsupportedOperationError,
    XLoraConfig,
    get_peft_model,
)
from loramix.passes.text_pass import real_and_first
from loramix.routers import EvidenceRouter, RouterSizes, gating_of
from loramix.routers.evidence import accumulated
from loramix.routers.linear import normalised
from loramix.routers.start import Moments
from loramix.training import init_router
from support.tiny import build, llama, save_expert, tokens

Experts = Callable[[str], dict[str, str]]


def mixture(experts: Experts, base: Any = None, **config: Any) -> Any:
    """A mixture whose router is far from its start."""
    settings = XLoraConfig(hidden_size=64, adapters=experts("llama"), router="evidence", **config)
    model: Any = get_peft_model(llama() if base is None else base, settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.router.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: Any, *args: Any, **inputs: Any) -> Tensor:
    return model(*args, **inputs).logits


def by_loop(values: Tensor, decay: float, real: Tensor, first: Tensor, before: Tensor | None) -> Tensor:
    """The recurrence as it is written."""
    found = torch.zeros_like(values)
    for b in range(len(values)):
        z = torch.zeros(values.shape[-1]) if before is None else before[b]
        for t in range(values.shape[1]):
            z = torch.zeros_like(z) if first[b, t] else z
            z = decay * z + values[b, t] if real[b, t] else z
            found[b, t] = z
    return found


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("length", [1, 3, 64, 65, 200])
def test_the_blocks_give_what_the_recurrence_gives(length: int, decay: float) -> None:
    torch.manual_seed(0)
    values, log_decay = torch.randn(3, length, 4), torch.tensor([decay]).log()
    real, first = torch.rand(3, length) > 0.2, torch.rand(3, length) > 0.9
    first &= real
    for before in (None, torch.randn(3, 4)):
        expected = by_loop(values, decay, real, first, before)
        assert_close(accumulated(values, log_decay, real, first, before), expected, atol=2e-5, rtol=1e-4)


def test_the_logits_are_those_of_the_equation() -> None:
    config = XLoraConfig(hidden_size=8, adapters={}, router="evidence", layerwise_scalings=True)
    router = EvidenceRouter.build(config, RouterSizes(8, 5, 3))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter))
    x, real = torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    found = router.distinct(router.read(x, real, ~real, None))
    decay = torch.sigmoid(router.memory).detach()
    y = torch.zeros(5, 3)
    for t in range(6):
        y = decay * y + (router.weight @ x[0, t] + router.bias).reshape(5, 3)
        assert_close(found[0, t], router.prior.reshape(5, 3) + y, atol=1e-4, rtol=1e-5)


def test_texts_that_are_packed_into_a_row_do_not_hear_of_each_other(experts: Experts) -> None:
    model, ids = mixture(experts), tokens()[:1]
    packed = torch.cat([torch.arange(4), torch.arange(5)]).unsqueeze(0)
    model(ids, position_ids=packed, use_cache=False)
    together = model.get_latest_scalings()
    model(ids[:, 4:], use_cache=False)
    assert_close(together[:, 4:], model.get_latest_scalings())


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_pairs_tells_padding_and_texts(additive: bool, experts: Experts) -> None:
    model, ids = mixture(experts), tokens(1)
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).tril().bool()
    blocks[:, 0] = False  # padding
    mask = torch.where(blocks, -1e-3, torch.finfo(torch.float32).min) if additive else blocks
    positions = torch.cat([torch.tensor([0]), torch.arange(3), torch.arange(5)]).unsqueeze(0) + 7  # no 0
    model(ids, attention_mask=mask[None, None], position_ids=positions, use_cache=False)
    together = model.get_latest_scalings()
    for part in (slice(1, 4), slice(4, 9)):
        model(ids[:, part], use_cache=False)
        assert_close(together[:, part], model.get_latest_scalings())


def test_packed_texts_with_positions_of_several_axes(experts: Experts) -> None:
    arguments = {"attention_mask": None, "position_ids": torch.tensor([[[0, 1, 0, 0, 2]], [[0, 1, 0, 1, 2]]])}
    _, first = real_and_first(arguments, torch.Size([1, 5]), 0)
    assert first.tolist() == [[True, False, True, False, False]]


def test_a_mask_that_is_too_short_is_refused(experts: Experts) -> None:
    with pytest.raises(RoutingError, match=r"which tokens are padding[\s\S]*\(2, 5\) for 9 tokens"):
        mixture(experts)(tokens(), attention_mask=torch.ones(2, 5))


def test_a_pickled_cache_goes_on(experts: Experts) -> None:
    model, ids = mixture(experts), tokens()
    cache = pickle.loads(pickle.dumps(model(ids[:, :5], use_cache=True).past_key_values))
    expected = logits(model, ids, use_cache=False)[:, 5:]
    assert_close(logits(model, ids[:, 5:], past_key_values=cache), expected, atol=1e-5, rtol=1e-5)


def test_a_static_cache_keeps_its_shapes_and_is_not_cropped(experts: Experts) -> None:
    model, ids = mixture(experts), tokens()
    cache = StaticCache(config=model.config, max_cache_len=16)
    whole = logits(model, ids, use_cache=False)
    logits(model, ids[:, :5], past_key_values=cache)
    kept = next(each for each in vars(cache)["followers"])
    for t in range(5, 9):
        found = logits(model, ids[:, t : t + 1], past_key_values=cache)
        assert_close(found[:, 0], whole[:, t], atol=1e-5, rtol=1e-5)
        assert kept.rows.shape[1] == 1
    with pytest.raises(CacheError, match="a static cache that is cropped"):
        kept.cropped(2)


def test_a_share_for_the_base_alone_starts_as_for_any_kind(experts: Experts) -> None:
    config = {"gating": "with-none", "gating_settings": {"none_logit": 2.0}}
    settings = XLoraConfig(adapters=experts("llama"), router="evidence", **config)
    model: Any = get_peft_model(llama(), settings).eval()
    for _ in range(2):
        model(tokens())
        assert_close(model.get_latest_scalings(), torch.full_like(model.get_latest_scalings(), 0.25))
        init_router(model, "zeros")


def test_embeddings_may_be_given(experts: Experts) -> None:
    model, ids = mixture(experts), tokens()
    assert torch.equal(logits(model, inputs_embeds=model.get_input_embeddings()(ids)), logits(model, ids))


def test_a_cache_may_be_cropped_reordered_repeated_and_copied(experts: Experts) -> None:
    model, ids = mixture(experts), tokens()
    whole = logits(model, ids, use_cache=False)

    def prefilled() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :6], past_key_values=cache)
        return cache

    cache = prefilled()
    cache.crop(-2)
    assert_close(logits(model, ids[:, 4:], past_key_values=cache), whole[:, 4:], atol=1e-5, rtol=1e-5)
    cache = prefilled()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_close(logits(model, ids.flip(0)[:, 6:], past_key_values=cache), whole.flip(0)[:, 6:], atol=1e-5, rtol=1e-5)
    cache = prefilled()
    cache.batch_repeat_interleave(2)
    twice = ids.repeat_interleave(2, 0)[:, 6:]
    expected = whole.repeat_interleave(2, 0)[:, 6:]
    assert_close(logits(model, twice, past_key_values=cache), expected, atol=1e-5, rtol=1e-5)
    cache = prefilled()
    other = copy.deepcopy(cache)
    for each in (cache, other):
        assert_close(logits(model, ids[:, 6:], past_key_values=each), whole[:, 6:], atol=1e-5, rtol=1e-5)
    cache.reset()
    assert_close(logits(model, ids, past_key_values=cache), whole, atol=1e-5, rtol=1e-5)


def test_a_cache_that_it_did_not_fill_is_refused(experts: Experts) -> None:
    model, ids = mixture(experts), tokens()
    foreign = DynamicCache(config=model.config)
    logits(llama(), ids, past_key_values=foreign)
    with pytest.raises(CacheError, match="another model filled"):
        model(ids, past_key_values=foreign)
    own = model(ids, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="another mixture filled"):
        mixture(experts)(ids, past_key_values=own)
    with model.disable_adapter(), torch.no_grad():
        model(ids, past_key_values=own)
    with pytest.raises(CacheError, match=r"18 tokens in the cache, 9 of which were routed"):
        model(ids, past_key_values=own)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 2},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_transformers_own_generation_gives_the_same_tokens_as_without_a_cache(
    settings: dict[str, Any], experts: Experts
) -> None:
    model, ids, mask = mixture(experts), tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    if "prompt_lookup_num_tokens" in settings:
        ids, mask = ids[:1].repeat(1, 2), torch.ones(1, 18, dtype=torch.long)
    plain = {"do_sample": False, **settings}
    plain = {k: v for k, v in plain.items() if k in ("do_sample", "num_beams", "num_return_sequences", "eos_token_id")}
    torch.manual_seed(0)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=False, **plain)
    torch.manual_seed(0)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, **{"do_sample": False, **settings})
    assert torch.equal(found, expected)


def test_an_adapted_embedding_is_read_without_its_experts(tmp_path: Path) -> None:
    targets = ["embed_tokens", "q_proj"]
    folders = {n: save_expert(tmp_path / n, llama(), seed=i, target_modules=targets) for i, n in enumerate("ab")}
    model = mixture(lambda _kind: folders)
    model(tokens())
    embedded = normalised(F.embedding(tokens(), llama().get_input_embeddings().weight))
    real = torch.ones(tokens().shape, dtype=torch.bool)
    expected = model.router.distinct(model.router.read(embedded, real, ~real, None)).softmax(-1)
    assert_close(model.get_latest_scalings(), expected.expand(-1, -1, len(model.adapted_modules), -1))


def test_what_it_cannot_do_is_refused_by_name(experts: Experts) -> None:
    with pytest.raises(ConfigurationError, match=r"Evidence adds up[\s\S]*enable_softmax=False"):
        mixture(experts, enable_softmax=False)
    with pytest.raises(UnsupportedOperationError, match="keeps something else of each text"):
        mixture(experts).init_continuous_batching()


BLOCKS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
OTHERS: dict[str, tuple[type[Any], dict[str, Any], str, str]] = {
    "two texts": (hf.T5ForConditionalGeneration, {"d_model": 64, "d_ff": 96, "num_layers": 1}, "q", "a text each"),
    "images": (hf.ViTModel, {**BLOCKS, "image_size": 8, "patch_size": 4}, "q_proj query", "no embedding of tokens"),
    "narrow": (hf.ElectraModel, {**BLOCKS, "embedding_size": 32}, "query", "embeddings of the width 32"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_base_model_without_one_text_of_its_width_is_refused(name: str, tmp_path: Path) -> None:
    kind, config, target, received = OTHERS[name]
    base = build(kind, **config)
    folders = {n: save_expert(tmp_path / n, base, target_modules=target.split(), task_type=None) for n in ("a", "b")}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ModelError, match=received):
        get_peft_model(base, XLoraConfig(hidden_size=64, adapters=folders, router="evidence"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_its_start_is_where_the_loss_is_least() -> None:
    torch.manual_seed(0)
    moments = Moments(6, 3)
    experts = torch.randint(0, 3, (400,))
    features = torch.randn(400, 6) + 2 * F.one_hot(experts, 6)
    moments.add(features, experts)
    config = XLoraConfig(hidden_size=6, adapters={}, router="evidence")
    found = moments.fit_logistic(gating_of(config))
    both = torch.cat([found.weight * features.std(), found.bias.unsqueeze(1)], 1).requires_grad_()
    counts = torch.bincount(experts)
    logits = features / features.std() @ both[:, :-1].T + both[:, -1]
    loss = F.cross_entropy(logits, experts, weight=1 / counts) + 0.1 * both[:, :-1].square().sum() / 6
    (gradient,) = torch.autograd.grad(loss, both)
    assert gradient.abs().max() < 1e-3
    assert found.accuracy > 0.7
