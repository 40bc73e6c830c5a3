"""Both passes in one forward per token: not one token differs, whatever the drafts are."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig, MistralConfig, MistralForCausalLM
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from decoding.test_exactness import PADDING, generated, ids_with_padding
from loramix.decoding.draft_head import DraftHead
from loramix.decoding.drafts import Repeats
from loramix.decoding.eligibility import MODELS, why_not_this_generation
from loramix.decoding.lockstep import Lockstep, LockstepReport
from loramix.errors import CacheError, ConfigurationError
from loramix.passes.hooks import RoutingHook
from loramix.passes.two_pass import attach
from support.mixtures import mixture
from support.tiny import save_expert, save_experts, tokens

LONG = 24
MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"input_ids": tokens(1)},
    "batch": lambda: {"input_ids": tokens(3)},
    "left padding": lambda: {"input_ids": ids_with_padding(), "attention_mask": PADDING},
    "sampling": lambda: {"input_ids": tokens(2), "do_sample": True, "temperature": 1.5, "top_k": 20},
    "several sequences": lambda: {"input_ids": tokens(1), "do_sample": True, "num_return_sequences": 3},
    "penalties": lambda: {"input_ids": tokens(2), "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "one token": lambda: {"input_ids": tokens(1, 1)},
    "in chunks": lambda: {"input_ids": tokens(2), "prefill_chunk_size": 4},
    "an end": lambda: {"input_ids": tokens(4), "eos_token_id": 30, "pad_token_id": 0},
}


@pytest.fixture(scope="module", params=["good drafts", "bad drafts"])
def drafts(request: pytest.FixtureRequest, model: Any) -> Any:
    """The mixture near its base model, whose drafts are mostly right, and as it is."""
    model.set_global_scaling_weight(0.02 if request.param == "good drafts" else 1.0)
    yield model
    model.set_global_scaling_weight(1.0)


def report_of(model: Any) -> LockstepReport:
    assert model.lockstep_report is not None
    return model.lockstep_report


@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_are_those_of_two_passes(mode: str, drafts: Any) -> None:
    inputs = MODES[mode]() | {"max_new_tokens": LONG}
    expected = generated(drafts, lockstep=False, **inputs)
    assert report_of(drafts).tokens == 0
    found = generated(drafts, lockstep=True, **inputs)
    assert torch.equal(found, expected)
    report = report_of(drafts)
    new = expected.shape[1] - MODES[mode]()["input_ids"].shape[1]
    assert report.reason is None
    assert report.tokens == new - 1  # the prompt gave the first
    wrong, rows = report.drafts - report.right, len(expected)
    assert report.tokens + 1 + wrong / rows <= report.forwards <= report.tokens + 1 + wrong
    assert report.drafts == rows * (report.tokens - 1) or (mode == "an end" and report.drafts > 0)
    for wanted in (3, "lookup"):
        assert torch.equal(generated(drafts, lockstep=wanted, **inputs), expected)
        report = report_of(drafts)
        assert report.tokens == new - 1
        assert report.rounds["ahead" if wanted == 3 else "together"]


def test_only_rows_whose_draft_was_wrong_are_read_again(of_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each round the rows of the recovery; with the others they give what two passes give."""
    read: list[int] = []
    run = Lockstep._run

    def count(self: Lockstep, call: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(len(ids))
        return run(self, call, ids, *args, **kwargs)

    monkeypatch.setattr(Lockstep, "_run", count)
    of_llama.set_global_scaling_weight(0.1)
    inputs = {"input_ids": ids_with_padding(), "attention_mask": PADDING, "max_new_tokens": LONG}
    expected = generated(of_llama, lockstep=False, **inputs)
    assert torch.equal(generated(of_llama, lockstep=True, **inputs), expected)
    of_llama.set_global_scaling_weight(1.0)
    rows, report = len(expected), report_of(of_llama)
    again = [count for count in read if count < 2 * rows]
    assert sum(again) == rows + report.drafts - report.right  # all at first, then those that were wrong
    assert any(count < rows for count in again)


def test_an_end_of_text_within_the_prompt_finishes_no_row(of_llama: Any) -> None:
    """The last chunk of a prompt may be one token, and that token an end of text."""
    ids = tokens(2)
    ids[0, -1] = 1
    inputs = {"input_ids": ids, "prefill_chunk_size": 4, "eos_token_id": 1, "pad_token_id": 1, "max_new_tokens": LONG}
    expected = generated(of_llama, lockstep=False, **inputs)
    for wanted in (True, 5, "lookup"):
        assert torch.equal(generated(of_llama, lockstep=wanted, **inputs), expected)
        assert report_of(of_llama).tokens == expected.shape[1] - 9 - 1


@pytest.mark.parametrize("wanted", [True, 5])
def test_what_is_switched_meanwhile_is_refused_as_between_two_passes(wanted: Any, of_llama: Any) -> None:
    def switch(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 12:
            of_llama.disable_adapter_layers()
        return scores

    for how in (False, wanted):
        with pytest.raises(CacheError, match="continued the way it was filled"):
            generated(of_llama, input_ids=tokens(1), max_new_tokens=12, logits_processor=[switch], lockstep=how)
        of_llama.enable_adapter_layers()


def test_a_hook_that_comes_meanwhile_sees_each_token_from_then_on(of_llama: Any) -> None:
    class Seen(RoutingHook):
        def __init__(self) -> None:
            self.tokens = 0

        def made(self, made: Any) -> None:
            self.tokens += made.final.shape[1]

    found = []
    for wanted in (False, True, 5):
        hook, detach = Seen(), []

        def put_on(ids: Tensor, scores: Tensor, hook: Seen = hook, detach: list[Any] = detach) -> Tensor:
            if ids.shape[1] == 12:
                detach.append(attach(of_llama, hook))
            return scores

        of_llama.set_global_scaling_weight(0.0)
        generated(of_llama, input_ids=tokens(1), max_new_tokens=12, logits_processor=[put_on], lockstep=wanted)
        of_llama.set_global_scaling_weight(1.0)
        detach[0]()
        found.append(hook.tokens)
    assert found == [8, 8, 8]


@pytest.mark.parametrize("wanted", [0, False])
def test_no_drafts_are_two_passes(wanted: Any, of_llama: Any) -> None:
    generated(of_llama, input_ids=tokens(1), max_new_tokens=4, lockstep=wanted)
    assert report_of(of_llama).reason == "it was not wanted"


def test_embeddings_are_continued_ahead(of_llama: Any) -> None:
    embeddings = of_llama.get_input_embeddings()(tokens(2))
    expected = generated(of_llama, inputs_embeds=embeddings, max_new_tokens=12, lockstep=False)
    assert torch.equal(generated(of_llama, inputs_embeds=embeddings, max_new_tokens=12, lockstep=5), expected)
    assert report_of(of_llama).rounds["ahead"]


def test_a_round_ahead_costs_a_scaling_pass_for_each_token_and_one_mixture_pass(of_llama: Any) -> None:
    of_llama.set_global_scaling_weight(0.0)
    generated(of_llama, input_ids=tokens(1), max_new_tokens=LONG + 1, lockstep=5)
    report = report_of(of_llama)
    assert report.accepted == 1.0
    assert report.tokens == LONG
    assert dict(report.rounds) == {"ahead": LONG // 6}
    assert report.forwards == 7 * (LONG // 6)
    generated(of_llama, input_ids=tokens(1), max_new_tokens=LONG, lockstep=5)  # the last round reads nothing in vain
    assert report_of(of_llama).forwards == 7 * (LONG // 6 - 1) + 6
    of_llama.set_global_scaling_weight(1.0)


def test_what_the_text_has_said_costs_two_forwards_for_many_tokens(of_llama: Any) -> None:
    """A prompt that repeats itself, and a text that is made to repeat it: each draft is right."""
    words = tokens(1, 6)
    prompt, again = words.repeat(1, 2), words[0].tolist()

    def repeat(ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, again[ids.shape[1] % 6]] = 0.0
        return forced

    inputs = {"input_ids": prompt, "max_new_tokens": 17, "logits_processor": [repeat]}
    expected = generated(of_llama, lockstep=False, **inputs)
    assert torch.equal(generated(of_llama, lockstep="lookup", **inputs), expected)
    report = report_of(of_llama)
    assert report.accepted == 1.0
    assert dict(report.rounds) == {"lookup": 2}
    assert report.forwards == 4
    assert report.forwards_per_token == 0.25


def test_repeats_are_found_and_go_on(of_llama: Any) -> None:
    assert Repeats([1, 2, 3, 4]).drafts(3) == []
    text = Repeats([1, 2, 3, 4, 5, 1, 2])
    assert text.drafts(3) == []
    text.add(3)
    assert text.drafts(3) == [4, 5, 1]
    assert text.drafts(7) == [4, 5, 1, 2, 3, 4, 5]  # as if it went on so
    assert Repeats([7, 7, 7, 7]).drafts(3) == [7, 7, 7]
    assert Repeats([1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3]).drafts(1) == [9]  # the last time counts


@pytest.mark.parametrize("wanted", [-1, "always", 2.5])
def test_what_lockstep_cannot_be_is_refused(wanted: Any, of_llama: Any) -> None:
    if isinstance(wanted, int):  # the tests check types before the package does
        with pytest.raises(ConfigurationError, match="number of drafts"):
            generated(of_llama, input_ids=tokens(1), max_new_tokens=2, lockstep=wanted)
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    settings.lockstep = wanted
    with pytest.raises(ConfigurationError, match="number of drafts"):
        of_llama.generate(tokens(1), generation_config=settings)


def test_the_scalings_of_tokens_that_were_read_ahead_are_served_one_by_one(of_llama: Any) -> None:
    seen: list[list[Tensor]] = []
    for wanted in (False, 5):
        latest: list[Tensor] = []

        def look(ids: Tensor, scores: Tensor, latest: list[Tensor] = latest) -> Tensor:
            latest.append(of_llama.get_latest_scalings()[:, -1])
            return scores

        generated(of_llama, input_ids=tokens(2), max_new_tokens=12, logits_processor=[look], lockstep=wanted)
        seen.append(latest)
    for one, other in zip(*seen, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_tokens_are_not_read_ahead_while_somebody_watches(of_llama: Any) -> None:
    of_llama.enable_scalings_logging()
    generated(of_llama, input_ids=tokens(1), max_new_tokens=12, lockstep=5)
    of_llama.disable_scalings_logging()
    of_llama.clear_scalings_log()
    assert "ahead" not in report_of(of_llama).rounds


def test_a_rounded_head_guesses_as_well_and_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramix.decoding.draft_head.LEAST", 1)
    monkeypatch.setattr(model._loramix, "draft_head", None)
    for weight in (0.0, 1.0):
        model.set_global_scaling_weight(weight)
        inputs = {"input_ids": tokens(2), "max_new_tokens": LONG}
        expected = generated(model, lockstep=False, **inputs)
        assert torch.equal(generated(model, lockstep=True, **inputs), expected)
        if not weight:
            assert report_of(model).accepted > 0.7
    assert model._loramix.draft_head[1] is not None
    model.set_global_scaling_weight(1.0)


def test_a_rounded_head_follows_its_weights_and_is_made_where_it_pays() -> None:
    head = torch.nn.Linear(64, 500, bias=False)
    assert DraftHead.of(head) is None
    weight = torch.randn(2**13, 2**9)
    large = torch.nn.Linear(2**9, 2**13, bias=False)
    large.weight.data.copy_(weight)
    guess = DraftHead.of(large)
    assert guess is not None
    assert torch.equal(guess(weight[:20]), torch.arange(20))  # a row's own weights have the largest product with it
    assert DraftHead.of(large.bfloat16()) is None
    assert DraftHead.of(torch.nn.Linear(2**9, 2**13)) is None


def test_drafts_are_right_where_the_experts_add_little(model: Any) -> None:
    model.set_global_scaling_weight(0.0)
    generated(model, input_ids=tokens(2), max_new_tokens=LONG, lockstep=True)
    model.set_global_scaling_weight(1.0)
    assert report_of(model).accepted == 1.0
    assert report_of(model).forwards_per_token == pytest.approx(1 + 1 / (LONG - 1))


@pytest.mark.parametrize("wanted", [True, 5])
def test_what_is_recorded_is_that_of_two_passes(wanted: Any, drafts: Any) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    inputs = {"input_ids": tokens(2), "max_new_tokens": LONG, **asked}
    expected, found = generated(drafts, lockstep=False, **inputs), generated(drafts, lockstep=wanted, **inputs)
    for name in ("scores", "logits"):
        assert len(found[name]) == LONG
        for one, other in zip(found[name], expected[name], strict=True):
            assert_close(one, other, atol=2e-5, rtol=1e-4)
    for one, other in ((found, expected), (found.past_key_values, expected.past_key_values)):
        assert type(one) is type(other)
    halves = ((c, c.base) for c in (found.past_key_values, expected.past_key_values))
    for one, other in zip(*halves, strict=True):
        assert one.get_seq_length() == other.get_seq_length() == 9 + LONG - 1
        for layer, own in zip(one.layers, other.layers, strict=True):
            assert_close(layer.keys, own.keys, atol=2e-5, rtol=1e-4)
            assert_close(layer.values, own.values, atol=2e-5, rtol=1e-4)


def test_the_cache_is_continued_either_way(drafts: Any) -> None:
    whole = generated(drafts, input_ids=tokens(2), max_new_tokens=24, lockstep=False)
    for first, second in ((True, False), (False, True), (True, True), (4, 4)):
        part = generated(drafts, input_ids=tokens(2), max_new_tokens=12, lockstep=first, return_dict_in_generate=True)
        rest = generated(
            drafts,
            input_ids=part.sequences,
            attention_mask=torch.ones_like(part.sequences),  # the padding's token is among what was generated
            past_key_values=part.past_key_values,
            max_new_tokens=12,
            lockstep=second,
        )
        assert torch.equal(rest, whole)


def test_what_is_wanted_may_stand_in_the_configuration(of_llama: Any) -> None:
    plain = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = copy.deepcopy(plain)
    wanted.lockstep = True
    expected = of_llama.generate(tokens(), generation_config=plain, lockstep=False)
    assert torch.equal(of_llama.generate(tokens(), generation_config=wanted), expected)
    assert report_of(of_llama).forwards < 2 * report_of(of_llama).tokens + 8
    assert report_of(of_llama).drafts
    of_llama.generate(tokens(), generation_config=wanted, lockstep=False)
    assert report_of(of_llama).reason == "it was not wanted"


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten())

    def end(self) -> None:
        self.parts.append(torch.tensor([-1]))


def test_streamers_and_stopping_criteria_work(of_llama: Any) -> None:
    streamer = Collected()
    stop = StoppingCriteriaList([MaxLengthCriteria(20)])
    found = generated(
        of_llama, input_ids=tokens(1), max_new_tokens=LONG, lockstep=True, streamer=streamer, stopping_criteria=stop
    )
    assert torch.cat(streamer.parts).tolist() == [*found[0].tolist(), -1]
    assert found.shape[1] == 20


def test_the_log_and_hooks_see_what_they_see_of_two_passes(of_llama: Any) -> None:
    class Seen(RoutingHook):
        def __init__(self) -> None:
            self.scalings: list[Tensor] = []

        def made(self, made: Any) -> None:
            self.scalings.append(made.final)

    records: list[list[Tensor]] = []
    for lockstep in (False, True):
        hook = Seen()
        detach = attach(of_llama, hook)
        of_llama.clear_scalings_log()
        of_llama.enable_scalings_logging()
        generated(of_llama, input_ids=tokens(2), max_new_tokens=12, lockstep=lockstep)
        of_llama.disable_scalings_logging()
        detach()
        records.append([*hook.scalings, *of_llama.get_scalings_log(), of_llama.get_latest_scalings()])
    of_llama.clear_scalings_log()
    assert len(records[0]) == len(records[1]) == 2 * 12 + 1
    for one, other in zip(*records, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


FALLBACKS: dict[str, dict[str, Any]] = {
    "only greedy decoding and sampling": {"num_beams": 2},
    "there is no cache": {"use_cache": False},
    "the cache is a static one": {"cache_implementation": "static"},
    "hidden states are asked for": {"output_hidden_states": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_cannot_run_in_lockstep_runs_without_and_says_so_once(
    reason: str, of_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramix.decoding.requests._told", set())
    with pytest.warns(UserWarning, match=reason):
        generated(of_llama, input_ids=tokens(), max_new_tokens=4, lockstep=True, **FALLBACKS[reason])
    found = generated(of_llama, input_ids=tokens(), max_new_tokens=4, lockstep=True, **FALLBACKS[reason])
    expected = generated(of_llama, input_ids=tokens(), max_new_tokens=4, lockstep=False, **FALLBACKS[reason])
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))


def test_one_pass_needs_no_lockstep(of_llama: Any) -> None:
    with of_llama.disable_adapter():
        generated(of_llama, input_ids=tokens(), max_new_tokens=4)
    assert report_of(of_llama).reason == "there is only one pass"


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_stores_grow_and_windows_slide(architecture: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than a chunk has slots; with Gemma, a window of four."""
    monkeypatch.setattr("loramix.decoding.row_cache.CHUNK", 8)
    experts = save_experts(tmp_path, architecture)
    model = mixture(experts, architecture, layerwise_scalings=True, xlora_depth=2)
    model.set_global_scaling_weight(0.1)
    inputs = {"input_ids": tokens(2), "max_new_tokens": 40}
    expected = generated(model, lockstep=False, **inputs)
    for wanted in (True, 5):
        assert torch.equal(generated(model, lockstep=wanted, **inputs), expected)


def mistral(**changes: Any) -> Any:
    """A sliding window of four in every block, and no list that says so."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "sliding_window": 4}
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=96, num_key_value_heads=2, max_position_embeddings=128, **sizes, **special)
    config._attn_implementation = changes.get("attention", "sdpa")
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["greedy", "left padding"])
def test_a_window_in_every_block(mode: str, attention: str, experts: Any) -> None:
    model = mixture(experts("llama"), base=mistral(attention=attention), layerwise_scalings=True)
    inputs = MODES[mode]() | {"max_new_tokens": LONG}
    expected = generated(model, lockstep=False, **inputs)
    for wanted in (True, 3):
        assert torch.equal(generated(model, lockstep=wanted, **inputs), expected)
        assert report_of(model).reason is None


def test_a_model_in_training_mode_draws_for_each_pass(experts: Any) -> None:
    model = mixture(experts("llama")).train()
    generated(model, input_ids=tokens(1), max_new_tokens=2)
    assert "training mode" in str(report_of(model).reason)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "granite": ("Granite", {"logits_scaling": 2.0}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, "sliding_window": 4}),
    "olmo2": ("Olmo2", {}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_model_classes_that_are_said_to_be_exact_are(kind: str, tmp_path: Any) -> None:
    name, special = KINDS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {} if kind == "gpt_neox" else {"num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(vocab_size=96, **sizes, **heads, **ends, **special)

    def build() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    assert config.model_type in MODELS
    targets = ["query_key_value"] if kind == "gpt_neox" else ["o_proj"] if kind == "phi3" else ["q_proj", "v_proj"]
    experts = {
        name: save_expert(tmp_path / name, build(), seed=i, target_modules=targets) for i, name in enumerate("ab")
    }
    model = mixture(experts, base=build())
    for mode in ("greedy", "left padding"):
        inputs = MODES[mode]() | {"max_new_tokens": LONG}
        expected = generated(model, lockstep=False, **inputs)
        for wanted in (True, 3):
            assert torch.equal(generated(model, lockstep=wanted, **inputs), expected)
            assert report_of(model).reason is None


def test_every_class_that_is_said_to_be_exact_is_tested() -> None:
    assert {*KINDS, "llama", "qwen3", "gemma3_text", "opt", "gpt2", "mistral"} == MODELS


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frequencies": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary"),
    "another kind": ({"model_type": "gpt_neo"}, "gpt_neo"),
    "the router's logits": ({"output_router_logits": True}, "router's logits"),
    "other attention": ({"layer_types": ["chunked_attention", "full_attention"]}, "other kinds"),
    "flash attention": ({"_attn_implementation": "flash_attention_2"}, "takes no masks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_is_not_done(case: str, of_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, reason = REFUSED[case]
    config = copy.deepcopy(of_llama.config)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    settings = GenerationConfig(use_cache=True)
    settings.is_assistant = False
    monkeypatch.setattr(of_llama, "config", config)
    found = why_not_this_generation(of_llama, of_llama._loramix, None, settings, DynamicCache())
    assert reason in str(found)


def test_a_hook_that_somebody_put_on_a_module_sees_one_row_a_text(of_llama: Any) -> None:
    rows: list[int] = []
    handle = of_llama.model.layers[0].register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    generated(of_llama, input_ids=tokens(2), max_new_tokens=8)
    handle.remove()
    assert set(rows) == {2}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_cache_of_ones_own(architecture: str, experts: Any) -> None:
    """One that was made without the model's configuration knows no windows: then the passes go one by one."""
    model = mixture(experts(architecture), architecture)
    ids = tokens(2)
    expected = generated(model, input_ids=ids, past_key_values=DynamicCache(), max_new_tokens=LONG, lockstep=False)
    found = generated(model, input_ids=ids, past_key_values=DynamicCache(), max_new_tokens=LONG)
    assert torch.equal(found, expected)
    cache = DynamicCache(config=model.config)
    assert torch.equal(
        generated(model, input_ids=ids, past_key_values=cache, max_new_tokens=LONG, lockstep=True), expected
    )
    assert report_of(model).drafts


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a forward": lambda model, ids: model(input_ids=ids),
    "embeddings": lambda model, ids: model(inputs_embeds=model.get_input_embeddings()(ids)),
    "one token": lambda model, ids: model(input_ids=ids[:, -1:], position_ids=torch.zeros(len(ids), 1).long()),
    "beams": lambda model, ids: model.generate(ids, num_beams=3, max_new_tokens=4, do_sample=False),
    "another generation": lambda model, ids: model.generate(ids, max_new_tokens=4, do_sample=False, lockstep=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wanted", [True, 4])
@pytest.mark.parametrize("weight", [0.02, 1.0])
def test_whoever_calls_the_model_meanwhile_is_answered_as_ever(
    call: str, weight: float, wanted: Any, of_llama: Any
) -> None:
    answers: list[Any] = []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        answers.append(CALLS[call](of_llama, ids))
        return scores

    of_llama.set_global_scaling_weight(weight)
    inputs = {"input_ids": tokens(2), "max_new_tokens": 10, "logits_processor": [processor]}
    expected = generated(of_llama, lockstep=False, **inputs)
    right, answers = answers, []
    assert torch.equal(generated(of_llama, lockstep=wanted, **inputs), expected)
    assert report_of(of_llama).tokens == 9
    of_llama.set_global_scaling_weight(1.0)
    for one, other in zip(answers, right, strict=True):
        assert_close(getattr(one, "logits", one), getattr(other, "logits", other), atol=2e-5, rtol=1e-4)


def test_the_last_position_is_reached(experts: Any) -> None:
    model = mixture(experts("gpt2"), "gpt2")
    inputs = {"input_ids": tokens(1, 9), "max_new_tokens": 128 - 9 + 1}
    expected = generated(model, lockstep=False, **inputs)
    for wanted in (True, 5):
        assert torch.equal(generated(model, lockstep=wanted, **inputs), expected)


def test_what_finished_rows_leave_behind_is_that_of_two_passes(of_llama: Any) -> None:
    ids = tokens(3)
    whole = generated(of_llama, input_ids=ids, max_new_tokens=12, lockstep=False)
    end = int(whole[0, 9 + 4])
    inputs = {"input_ids": ids, "max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 0}
    inputs |= {"return_dict_in_generate": True, "output_logits": True}
    expected = generated(of_llama, lockstep=False, **inputs)
    for wanted in (True, 4):
        found = generated(of_llama, lockstep=wanted, **inputs)
        assert torch.equal(found.sequences, expected.sequences)
        for one, other in zip(found.logits, expected.logits, strict=True):
            assert_close(one, other, atol=2e-5, rtol=1e-4)
        for one, other in zip(found.past_key_values.base.layers, expected.past_key_values.base.layers, strict=True):
            assert_close(one.keys, other.keys, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("wanted", [True, 5])
def test_a_setting_that_changes_meanwhile_counts_from_the_next_token(wanted: Any, of_llama: Any) -> None:
    def run(lockstep: Any) -> Any:
        class Change(BaseStreamer):
            count = 0

            def put(self, value: Tensor) -> None:
                self.count += 1
                if self.count == 6:
                    of_llama.set_scaling_pass_value(0.9)

            def end(self) -> None:
                of_llama.set_scaling_pass_value(0.2)

        asked = {"return_dict_in_generate": True, "output_logits": True}
        return generated(
            of_llama, input_ids=tokens(1), max_new_tokens=12, streamer=Change(), lockstep=lockstep, **asked
        )

    of_llama.set_global_scaling_weight(0.02)
    found, expected = run(wanted), run(False)
    of_llama.set_global_scaling_weight(1.0)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_keys_and_values_are_held_once(of_llama: Any) -> None:
    """The passes' own caches are views of the store while it stands in for them."""
    shared: list[bool] = []

    class Look(BaseStreamer):
        def put(self, value: Tensor) -> None:
            layer = cache.layers[0]
            if hasattr(cache, "base") and cache.torn:
                shared.append(
                    layer.keys.untyped_storage().data_ptr() == cache.base.layers[0].keys.untyped_storage().data_ptr()
                )

        def end(self) -> None: ...

    cache: Any = DynamicCache(config=of_llama.config)
    generated(of_llama, input_ids=tokens(1), past_key_values=cache, max_new_tokens=6, lockstep=True, streamer=Look())
    assert shared
    assert all(shared)


def test_a_model_of_inference_tensors(experts: Any) -> None:
    with torch.inference_mode():
        model = mixture(experts("llama"))
        found = generated(model, input_ids=tokens(1), max_new_tokens=8, lockstep=True)
        assert torch.equal(found, generated(model, input_ids=tokens(1), max_new_tokens=8, lockstep=False))


def test_beams_say_so_where_the_configuration_wanted_lockstep(of_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramix.decoding.requests._told", set())
    settings = GenerationConfig(max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    settings.lockstep = True
    with pytest.warns(UserWarning, match="only greedy"):
        of_llama.generate(tokens(1), generation_config=settings)
    generated(of_llama, input_ids=tokens(1), max_new_tokens=1, lockstep=True)  # one token needs no second forward
    with of_llama.fixed_scalings([0.2, 0.3, 0.5]):
        generated(of_llama, input_ids=tokens(1), max_new_tokens=4, lockstep=True)


@pytest.mark.parametrize("wanted", [True, 4])
def test_threads_decode_on_their_own(wanted: Any, of_llama: Any) -> None:
    expected = [generated(of_llama, input_ids=tokens(1, seed=i), max_new_tokens=16, lockstep=False) for i in range(4)]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        ids = tokens(1, seed=number)
        found[number] = of_llama.generate(ids, max_new_tokens=16, do_sample=False, lockstep=wanted)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_an_interruption_leaves_the_cache_whole(of_llama: Any) -> None:
    class Enough(Exception):
        pass

    class Stop(BaseStreamer):
        count = 0

        def put(self, value: Tensor) -> None:
            self.count += 1
            if self.count == 7:
                raise Enough

        def end(self) -> None: ...

    first = of_llama(tokens(1)[:, :-1], use_cache=True)
    cache = first.past_key_values
    with pytest.raises(Enough):
        generated(
            of_llama, input_ids=tokens(1), past_key_values=cache, max_new_tokens=20, lockstep=True, streamer=Stop()
        )
    assert cache.get_seq_length() == cache.base.get_seq_length() > 8
    part = generated(of_llama, input_ids=tokens(1), max_new_tokens=cache.get_seq_length() - 8, lockstep=False)
    rest = generated(of_llama, input_ids=part, past_key_values=copy.deepcopy(cache), max_new_tokens=4, lockstep=False)
    assert torch.equal(rest, generated(of_llama, input_ids=part, max_new_tokens=4, lockstep=False))
    cache.reset()
    expected = generated(of_llama, input_ids=tokens(1), max_new_tokens=4, lockstep=False)
    assert torch.equal(generated(of_llama, input_ids=tokens(1), max_new_tokens=4, past_key_values=cache), expected)


@pytest.mark.parametrize("wanted", [True, 2])
def test_the_distribution_is_that_of_two_passes(wanted: Any, of_llama: Any) -> None:
    """400 samples of three tokens: the frequencies of the first two letters agree within what chance allows."""
    ids = tokens(1).repeat(400, 1)
    counts: list[Tensor] = []
    for lockstep, seed in ((False, 1), (wanted, 2)):
        torch.manual_seed(seed)
        out = of_llama.generate(ids, max_new_tokens=3, do_sample=True, top_k=4, temperature=2.0, lockstep=lockstep)
        counts.append(torch.bincount(out[:, -1], minlength=96).double())
    one, other = counts
    seen = (one + other) > 0
    statistic = float(((one - other)[seen].square() / (one + other)[seen]).sum())
    freedom = int(seen.sum()) - 1
    assert freedom > 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of χ²
