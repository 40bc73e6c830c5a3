"""Weights that are chosen once by a prompt: what they are, for every kind of router, and what they feed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from loramix import (
    ConfigurationError,
    RoutingError,
    UnsupportedOperationError,
    XLoraConfig,
    get_peft_model,
)
from loramix.model.prompt_choice import PromptChoice, Responses, Similarity
from loramix.routers import router_kinds
from support.generation import generated
from support.mixtures import logits_of
from support.routers import EnergyRouter, PlainRouter
from support.tiny import ARCHITECTURES, llama, save_expert, save_experts, tokens

Experts = Callable[[str], dict[str, str]]
KINDS = [kind.kind for kind in (*router_kinds(), PlainRouter, EnergyRouter)]
every_kind = pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
PROMPT = {"input_ids": tokens()}


def mixture(folders: Mapping[str, str], kind: str = "classifier", architecture: str = "llama", **config: Any) -> Any:
    settings = XLoraConfig(hidden_size=64, adapters=dict(folders), router=kind, **config)
    torch.manual_seed(3)
    return get_peft_model(ARCHITECTURES[architecture](), settings).eval()


def examples(model: Any) -> dict[str, dict[str, Tensor]]:
    names = sorted(model.expert_names)  # each expert has the same text, whatever its number
    return {name: {"input_ids": tokens(2, 6, seed=20 + names.index(name))} for name in model.expert_names}


def by_examples(model: Any) -> PromptChoice:
    return Similarity.to(model, examples(model))


CHOICES: dict[str, Callable[[Any], PromptChoice]] = {
    "responses": lambda model: Responses(),
    "two responses": lambda model: Responses(top_k=2, signal="entropy"),
    "similarity": by_examples,
}
every_choice = pytest.mark.parametrize("choice", CHOICES)


@every_kind
@every_choice
def test_permuting_the_experts_permutes_the_weights(choice: str, kind: str, experts: Experts) -> None:
    folders, order = experts("llama"), [2, 0, 1]
    names = list(folders)
    one = mixture(folders, kind)
    other = mixture({names[i]: folders[names[i]] for i in order}, kind)
    found = CHOICES[choice](one)(one, PROMPT)
    assert found.shape == (2, 3)
    assert_close(found.sum(-1), torch.ones(2))
    assert found.std() > 1e-3
    assert_close(CHOICES[choice](other)(other, PROMPT), found[:, order], atol=1e-5, rtol=1e-5)


@every_kind
@every_choice
def test_padding_and_other_rows_change_nothing(choice: str, kind: str, experts: Experts) -> None:
    model = mixture(experts("llama"), kind)
    chosen, ids = CHOICES[choice](model), tokens(1, 5, seed=4)
    alone = chosen(model, {"input_ids": ids})
    left = {"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    left["input_ids"][1, 4:], left["attention_mask"][1, :4] = ids, 0
    right = {"input_ids": tokens(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    right["input_ids"][1, :5], right["attention_mask"][1, 5:] = ids, 0
    for batch in (left, right):
        assert_close(chosen(model, batch)[1:], alone, atol=1e-5, rtol=1e-5)
    assert_close(chosen(model, left)[:1], chosen(model, {"input_ids": tokens(2, 9)[:1]}), atol=1e-5, rtol=1e-5)


@every_kind
@every_choice
def test_it_feeds_fixed_routing_and_decoding_is_one_pass_or_merged(choice: str, kind: str, experts: Experts) -> None:
    model, calls = mixture(experts("llama"), kind), list[int]()
    prompt = {"input_ids": tokens(1)}
    weights = CHOICES[choice](model)(model, prompt)[0]
    model.fix_routing(prompt=prompt, by=CHOICES[choice](model))
    assert_close(model.fixed_routing, weights.expand(len(model.adapted_modules), -1))
    expected = logits_of(model)
    with model.fixed_scalings(weights):
        assert_close(logits_of(model), expected)
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    generated(model, input_ids=tokens(1), max_new_tokens=5)
    assert len(calls) == 5
    handle.remove()
    assert_close(logits_of(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def test_of_several_prompts_the_mean_is_fixed(experts: Experts) -> None:
    model = mixture(experts("llama"))
    model.fix_routing(prompt=PROMPT, by=Responses())
    assert_close(model.fixed_routing[0], Responses()(model, PROMPT).mean(0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("signal", ["norm", "entropy"])
def test_responses_are_what_each_expert_adds_at_the_last_token(
    signal: Any, architecture: str, experts: Experts
) -> None:
    model, inputs = mixture(experts(architecture), architecture=architecture), dict[str, Tensor]()
    block = [path for path in model.adapted_modules if ".1." in path]
    assert 0 < len(block) < len(model.adapted_modules)
    for path in block:
        layer = model.get_submodule(path)
        layer.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0].view(2, 9, -1)}))
    with model.fixed_scalings([1 / 3] * 3):
        logits_of(model)
    answers = torch.zeros(2, 3, 0)
    for path in block:
        stack = model.get_submodule(path).stack
        found = torch.zeros(2, 3, len(stack.lora_B))
        for expert, weights in stack.parts.items():
            scale = stack.rank_scale[stack.expert_of_rank == expert][0]
            found[:, expert] = scale * inputs[path][:, -1] @ weights.A.T @ weights.B.T
        answers = torch.cat([answers, found], dim=-1)
    if signal == "norm":
        signals = answers.norm(dim=-1)
    else:
        signals = 1 / torch.distributions.Categorical(logits=answers).entropy()
    expected = signals / signals.sum(-1, keepdim=True)
    assert_close(Responses(signal=signal)(model, PROMPT), expected, atol=1e-5, rtol=1e-4)
    everywhere = Responses(signal=signal, modules=model.adapted_modules)(model, PROMPT)
    assert not torch.allclose(everywhere, expected)


@pytest.mark.parametrize(
    ("targets", "settings"),
    [(["q_proj"], {"use_dora": True}), (["embed_tokens", "v_proj"], {}), (["down_proj"], {"lora_bias": True})],
    ids=["DoRA", "embedding", "LoRA bias"],
)
@every_choice
def test_every_kind_of_layer(choice: str, targets: list[str], settings: Any, tmp_path: Path) -> None:
    model = mixture(save_experts(tmp_path, "llama", target_modules=targets, **settings))
    found = CHOICES[choice](model)(model, PROMPT)
    assert_close(found.sum(-1), torch.ones(2))


def test_an_expert_that_is_absent_from_the_block_has_no_weight(experts: Experts, tmp_path: Path) -> None:
    few = save_expert(tmp_path / "few", llama(), target_modules=["layers.0.self_attn.q_proj"])
    model = mixture({**experts("llama"), "math": few})
    assert (Responses()(model, PROMPT)[:, 0] == 0).all()
    assert (Responses(modules=["model.layers.0.self_attn.q_proj"])(model, PROMPT) > 0).all()


def test_similarity_reads_the_base_model_alone(experts: Experts) -> None:
    model = mixture(experts("llama"), "static", enable_softmax=False)
    ids = tokens()
    with torch.no_grad():
        hidden = llama().model(ids).last_hidden_state.mean(1)
        means = torch.stack(
            [
                llama().model(each["input_ids"]).last_hidden_state.flatten(0, 1).mean(0)
                for each in examples(model).values()
            ]
        )
    choice = Similarity.to(model, examples(model), temperature=0.5)
    assert_close(choice.means, means, atol=1e-5, rtol=1e-5)
    centre = means.mean(0)
    cosines = torch.stack([torch.cosine_similarity(hidden - centre, each - centre) for each in means], dim=-1)
    assert_close(choice(model, {"input_ids": ids}), torch.softmax(cosines / 0.5, -1), atol=1e-4, rtol=1e-4)


@every_choice
def test_modes_settings_and_other_threads_are_left_alone(choice: str, experts: Experts) -> None:
    model = mixture(experts("llama"))
    model.fix_routing([0.2, 0.3, 0.5])
    expected, other = logits_of(model), list[Tensor]()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    inside = model.register_forward_pre_hook(lambda *_: other or in_a_thread(lambda: other.append(Tensor())))
    in_a_thread(lambda: CHOICES[choice](model)(model, PROMPT))
    inside.remove()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(logits_of(model.eval()), expected)
    assert model.get_latest_scalings() is None


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_bfloat16_chooses_nearly_the_same(experts: Experts) -> None:
    exact, model = mixture(experts("llama")), mixture(experts("llama")).to(torch.bfloat16)
    for choice in CHOICES.values():
        assert_close(choice(model)(model, PROMPT), choice(exact)(exact, PROMPT), atol=0.05, rtol=0.05)


EMPTY = {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 9, [0] * 9])}


@every_choice
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (EMPTY, "without a token in row 1"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(2, 8)}, "attention_mask': \\(2, 8\\)"),
        ({}, "by the tokens of a prompt"),
    ],
    ids=["padding", "another mask", "nothing"],
)
def test_prompts_that_are_none_are_refused(choice: str, prompt: Any, said: str, experts: Experts) -> None:
    model = mixture(experts("llama"))
    model.fix_routing([0.2, 0.3, 0.5])
    before = model.fixed_routing
    with pytest.raises(RoutingError, match=said):
        model.fix_routing(prompt=prompt, by=CHOICES[choice](model))
    assert torch.equal(model.fixed_routing, before)


def test_settings_that_cannot_work_are_refused(experts: Experts) -> None:
    model = mixture(experts("llama"))
    means = by_examples(model)
    assert isinstance(means, Similarity)
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: Responses(top_k=0), "top_k must be a whole number of at least 1"),
        (lambda: Responses(top_k=4)(model, PROMPT), "top_k=4 for 3 experts"),
        (lambda: Responses(modules=["model.layers.9.q_proj"])(model, PROMPT), "some of model.adapted_modules"),
        (lambda: Responses(modules=[])(model, PROMPT), "some of model.adapted_modules"),
        (lambda: Similarity(means.means, temperature=0.0), "temperature of a softmax is positive"),
        (lambda: Similarity(means.means[:2])(model, PROMPT), r"means of shape \(2, 64\)"),
        (lambda: Similarity(means.means[:, :9])(model, PROMPT), r"means of shape \(3, 9\)"),
        (lambda: Similarity.to(model, {"math": PROMPT}), "examples for 'math'"),
        (lambda: model.fix_routing(by=Responses()), "by one of them"),
        (lambda: model.fix_routing([0.2, 0.3, 0.5], by=Responses()), "prompt=None"),
    ]
    for call, said in bad:
        with pytest.raises(ConfigurationError, match=said):
            call()
    with pytest.raises(UnsupportedOperationError, match="Only a mixture"):
        Responses()(llama(), PROMPT)
    model.disable_adapter_layers()
    with pytest.raises(RoutingError, match=r"call enable_adapter_layers\(\)"):
        Responses()(model, PROMPT)
