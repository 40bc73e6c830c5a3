"""However a text is read, its record holds what one forward over all of it gives, each token once."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, StoppingCriteria, Trainer, TrainingArguments

import loramix
from loramix import ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.analysis import RoutingRecord, record_routing
from loramix.evaluation import leave_one_out
from support.mixtures import mixture
from support.tiny import ARCHITECTURES, llama, save_expert, tokens

Direct = Callable[[Any, Any], Tensor]
PADDING = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


def assert_is(record: RoutingRecord, model: Any, text: Any, direct: Direct) -> None:
    """The record holds one text, from its beginning, as one forward reads it."""
    text = torch.as_tensor(text)
    assert record.tokens.tolist() == text.tolist()
    assert record.positions.tolist() == list(range(len(text)))
    assert_close(record.scalings, direct(model, text), atol=1e-5, rtol=1e-4)


def assert_holds(record: RoutingRecord, model: Any, texts: list[Any], direct: Direct) -> None:
    """The record holds these texts, in this order, and nothing else."""
    assert record.sequences == list(range(len(texts)))
    assert record.kept == record.seen == sum(map(len, texts))
    for number, text in enumerate(texts):
        assert_is(record.sequence(number), model, text, direct)


@torch.no_grad()
def test_a_forward_is_recorded_row_by_row_without_its_padding(routed: Any, direct: Direct) -> None:
    ids = tokens(3)
    right = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2])
    with record_routing(routed) as record:
        routed(ids, attention_mask=right)
        routed(tokens(1, seed=2), use_cache=False)
    assert_holds(record, routed, [ids[0], ids[1, :4], ids[2, :7], tokens(1, seed=2)[0]], direct)
    assert record.layers == routed.adapted_modules
    assert record.experts == ["math", "code", "prose"]
    assert record.top_k == 2


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_generate_is_recorded_as_one_text_a_row(
    routed: Any, direct: Direct, cached: bool, lockstep: bool, padded: bool
) -> None:
    ids, mask = tokens(2), PADDING if padded else torch.ones(2, 9, dtype=torch.long)
    with record_routing(routed) as record:
        out = routed.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, lockstep=lockstep and cached, use_cache=cached
        )
    assert (routed.lockstep_report.reason is None) == (lockstep and cached)
    if lockstep and cached:
        assert routed.lockstep_report.accepted_drafts < routed.lockstep_report.drafts  # some were rejected
    texts = [out[0, 3:-1] if padded else out[0, :-1], out[1, :-1]]
    assert_holds(record, routed, texts, direct)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_architecture(architecture: str, experts: Any, direct: Direct) -> None:
    model = mixture(experts(architecture), architecture, layerwise_scalings=True)
    with record_routing(model) as record:
        out = model.generate(tokens(2), attention_mask=PADDING, max_new_tokens=8, do_sample=False)
    assert_holds(record, model, [out[0, 3:-1], out[1, :-1]], direct)


@pytest.mark.parametrize("padding", [0, "the end"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lockstep", [True, False])
def test_rows_that_have_finished_are_not_recorded_any_more(
    routed: Any, direct: Direct, padding: Any, cached: bool, lockstep: bool
) -> None:
    ids = tokens(3)
    free = routed.generate(ids, max_new_tokens=10, do_sample=False)
    end = int(free[0, 9 + 3])  # row 0 stops after at most four tokens
    assert end not in free[1, 9:].tolist()
    padding = end if padding == "the end" else 0
    ids[1, 2] = padding  # in a prompt it is a token like any other
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "do_sample": False,
        "lockstep": lockstep and cached,
        "use_cache": cached,
    }
    with record_routing(routed) as record:
        out = routed.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=end, pad_token_id=padding, **options
        )
    texts: list[Tensor] = []
    for row in out:
        ends = (row[9:] == end).nonzero().flatten().tolist()
        texts.append(row[: 9 + ends[0] + 1] if ends else row[:-1])
    assert any(len(text) < out.shape[1] - 1 for text in texts)
    assert_holds(record, routed, texts, direct)


def test_prefill_in_chunks_and_a_static_cache_are_the_same_text(routed: Any, direct: Direct) -> None:
    ids = tokens(2)
    for options in ({"prefill_chunk_size": 4}, {"cache_implementation": "static", "disable_compile": True}):
        with record_routing(routed) as record:
            out = routed.generate(ids, attention_mask=PADDING, max_new_tokens=5, do_sample=False, **options)
        assert_holds(record, routed, [out[0, 3:-1], out[1, :-1]], direct)


@pytest.mark.parametrize("cached", [True, False])
def test_beams_are_texts_that_fork_and_the_returned_one_is_found(routed: Any, direct: Direct, cached: bool) -> None:
    ids = tokens(2)
    with record_routing(routed) as record:
        out = routed.generate(
            ids, max_new_tokens=8, num_beams=4, num_return_sequences=2, do_sample=False, use_cache=cached
        )
    assert record.header.forks
    for row in out:
        assert_is(record.following(row), routed, row[:-1], direct)
    for number in record.sequences:  # also those that were given up
        text = record.sequence(number)
        assert_is(text, routed, text.tokens, direct)
    pairs = list(zip(record.sequence_numbers.tolist(), record.positions.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == record.seen == (2 * 4 * (9 + 7) if cached else record.seen)


def test_candidates_that_were_rejected_are_taken_back(routed: Any, direct: Direct) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with record_routing(routed) as record:
        out = routed.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3)
    read = record.seen
    assert_is(record, routed, out[0, :read], direct)
    assert read >= out.shape[1] - 4


@torch.no_grad()
def test_a_cache_carries_its_text_on_and_forks_with_copies_and_cuts(routed: Any, direct: Direct) -> None:
    first, second, third = tokens(1, seed=1), tokens(1, seed=2), tokens(1, seed=3)
    with record_routing(routed) as record:
        cache = routed(first).past_key_values  # made by the model
        twin = copy.deepcopy(cache)
        routed(second, past_key_values=cache)
        routed(third, past_key_values=twin)
        cache.crop(-12)
        routed(third[:, :4], past_key_values=cache)
        cache.reset()
        routed(third, past_key_values=cache)
    assert record.header.forks == {1: (0, 9), 2: (0, 6)}
    texts = [
        torch.cat([first, second], 1),
        torch.cat([first, third], 1),
        torch.cat([first[:, :6], third[:, :4]], 1),
        third,
    ]
    for number, text in enumerate(texts):
        assert_is(record.sequence(number), routed, text[0], direct)
    assert record.seen == 18 + 9 + 4 + 9


@torch.no_grad()
def test_rows_that_are_repeated_or_chosen_keep_their_texts(routed: Any, direct: Direct) -> None:
    ids, more = tokens(2), tokens(4, 3, seed=7)
    with record_routing(routed) as record:
        cache = routed(ids, past_key_values=DynamicCache()).past_key_values
        cache.batch_repeat_interleave(2)
        routed(more, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 0]))
        routed(more[:2], past_key_values=cache)
    for row in range(4):
        text = torch.cat([ids[row // 2], more[row]])
        assert_is(record.following(text), routed, text, direct)
    last = torch.cat([ids[1], more[3], more[0]])
    assert_is(record.following(last), routed, last, direct)


@torch.no_grad()
def test_what_was_read_before_is_not_recorded_and_is_counted(routed: Any, direct: Direct) -> None:
    ids = tokens(2)
    cache = routed(ids, attention_mask=PADDING).past_key_values
    more = torch.cat([PADDING, torch.ones(2, 4, dtype=torch.long)], 1)
    with record_routing(routed) as record:
        routed(tokens(2, 4, seed=5), attention_mask=more, past_key_values=cache)
    assert record.positions.tolist() == [*range(6, 10), *range(9, 13)]
    text = torch.cat([ids[1], tokens(2, 4, seed=5)[1]])
    assert_close(record.sequence(1).scalings, direct(routed, text)[9:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_several_texts_in_one_row_are_told_apart_as_attention_does(routed: Any, direct: Direct) -> None:
    ids = tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    with record_routing(routed) as record:
        routed(ids, position_ids=positions, use_cache=False)
    assert_holds(record, routed, [ids[0, :5], ids[0, 5:8], ids[0, 8:]], direct)


def test_the_trainers_evaluation_is_recorded(routed: Any, direct: Direct, tmp_path: Any) -> None:
    rows = [{"input_ids": tokens(1, 4 + i, seed=i)[0], "labels": tokens(1, 4 + i, seed=i)[0]} for i in range(3)]

    def collate(batch: list[Any]) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        return {"input_ids": ids, "labels": ids, "attention_mask": (ids != 0).long()}

    settings = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    trainer = Trainer(routed, settings, eval_dataset=rows, data_collator=collate)  # pyright: ignore
    trainer.remove_callback(
        next(
            type(c)
            for c in trainer.callback_handler.callbacks
            if "Print" in type(c).__name__ or "Progress" in type(c).__name__
        )
    )
    with record_routing(routed) as record:
        trainer.evaluate()
    assert_holds(record, routed, [row["input_ids"] for row in rows], direct)


def test_threads_do_not_mix(routed: Any, direct: Direct) -> None:
    start = threading.Barrier(4)

    def run(seed: int) -> tuple[RoutingRecord, Tensor]:
        start.wait()
        with record_routing(routed, only_this_thread=True) as own:
            out = routed.generate(tokens(2, seed=seed), max_new_tokens=8, do_sample=False)
        return own, out

    with record_routing(routed) as record, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    for own, out in found:
        assert_holds(own, routed, [row[:-1] for row in out], direct)
        for row in out:
            assert_is(record.following(row), routed, row[:-1], direct)
    assert len(record.sequences) == 8


def test_nothing_stays_behind(routed: Any) -> None:
    before = routed._loramix.hooks
    cache = DynamicCache()
    record = None
    try:
        with record_routing(routed) as record:
            routed(tokens(1), past_key_values=cache)
            assert len(cache.followers) == 1  # pyright: ignore
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert record is not None
    assert routed._loramix.hooks == before == ()
    assert cache.followers == ()
    routed(tokens(1), past_key_values=cache)
    assert record.seen == 9
    assert not record.scalings.requires_grad
    assert record.scalings.device.type == "cpu"
    gone = weakref.ref(record)
    del record
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_record_can_be_read_while_it_grows(routed: Any) -> None:
    with record_routing(routed) as record:
        assert "Nothing was recorded" in record.note
        routed(tokens(1))
        assert (record.seen, record.kept, len(record)) == (9, 9, 9)
        routed(tokens(2))
        assert len(record.scalings) == 27


@torch.no_grad()
def test_memory_is_bounded_and_the_sample_is_told(routed: Any, direct: Direct) -> None:
    text = tokens(1, 40)[0]
    sample = "16 tokens.*a uniform sample of the 80 tokens"
    with pytest.warns(UserWarning, match=sample), record_routing(routed, max_tokens=16, seed=1) as record:  # noqa: PT031
        routed(text[None], use_cache=False)
        routed(text[None], use_cache=False)
    assert (record.seen, record.kept, record.is_sample) == (80, 16, True)
    expected = direct(routed, text)
    assert_close(record.scalings, expected[record.positions], atol=1e-5, rtol=1e-4)
    assert record.tokens.tolist() == text[record.positions].tolist()
    with pytest.raises(RoutingError, match="in a sample"):
        record.following(text)


def test_each_token_has_the_same_chance_to_be_kept() -> None:
    from loramix.analysis.record.part import Part
    from loramix.analysis.record.stores import Reservoir

    counts = torch.zeros(60)
    for seed in range(100):
        store = Reservoir(12, seed)
        for first in range(0, 60, 5):
            number = torch.arange(first, first + 5)
            store.add(Part(number * 0, number, number, torch.zeros(5, 1, 2)))
        (part,) = store.parts()
        assert len(part) == 12
        counts[part.token] += 1
    assert counts.sum() == 100 * 12
    assert (counts - 20).abs().max() < 5 * (100 * 0.2 * 0.8) ** 0.5


@torch.no_grad()
def test_a_record_spilled_to_disk_is_the_same_record(routed: Any, direct: Direct, tmp_path: Any) -> None:
    with record_routing(routed, spill=tmp_path / "record", max_tokens=7) as record:
        out = routed.generate(tokens(2), max_new_tokens=8, do_sample=False)
        assert record.following(out[1]).tokens.tolist() == out[1, :-1].tolist()  # while it grows
    assert len(list((tmp_path / "record").glob("tokens-*.safetensors"))) == 5
    assert not record.is_sample
    for one in (record, RoutingRecord.load(tmp_path / "record")):
        assert_holds(one, routed, [row[:-1] for row in out], direct)
    with pytest.raises(ConfigurationError, match="new or empty folder"), record_routing(routed, spill=tmp_path):
        pass
    assert routed._loramix.hooks == ()


@torch.no_grad()
def test_what_is_recorded_is_what_the_layers_mix_by(routed: Any, shared: Any, direct: Direct) -> None:
    ids = tokens(1)
    with record_routing(routed) as record:
        routed(ids)
    assert (record.scalings > 0).sum(-1).unique().tolist() == [2]
    assert not bool((routed.get_latest_scalings() == 0).any())  # before top-k, which is not what is recorded
    with record_routing(shared) as once:
        shared(ids)
    assert once.shared
    assert once.layers == ["all layers"]
    assert once.scalings.shape == (9, 1, 3)
    assert "one routing for all 14 layers" in once.note
    with record_routing(routed) as changed:
        routed(ids)
        routed.set_topk_lora(1)
        routed(ids)
    routed.set_topk_lora(2)
    assert "settings changed meanwhile" in changed.note


COMPILED = """
import sys; sys.path[:0] = {path!r}
import torch
from support.byte_tokenizer import byte_tokenizer
from support.mixtures import mixture
from loramix.analysis import record_routing, stream_routing
from support.tiny import tokens
model = mixture({experts!r}, layerwise_scalings=True)
with torch.no_grad(), record_routing(model) as record:
    model(tokens(2), use_cache=False)
    torch.compile(model, backend="eager")(tokens(2), use_cache=False)
with torch.no_grad(), stream_routing(model, byte_tokenizer()) as streamer:
    torch.compile(model, backend="eager")(tokens(1), use_cache=False)
    assert streamer.routed.length == 9
assert record.sequences == [0, 1, 2, 3]
torch.testing.assert_close(record.scalings[:18], record.scalings[18:])
"""


@pytest.mark.parametrize("itself", [False, True], ids=["early exit", "assistant"])
def test_what_a_model_drafts_for_itself_is_not_recorded(routed: Any, direct: Direct, itself: bool) -> None:
    options = {"assistant_model": routed} if itself else {"assistant_early_exit": 1}
    with record_routing(routed) as record:
        out = routed.generate(tokens(1, 6), max_new_tokens=7, do_sample=False, **options)[0]
    assert_is(record.following(out), routed, out[:-1], direct)
    assert record.kept == 12


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"lockstep": True}], ids=str)
def test_what_a_logits_processor_reads_is_another_text(routed: Any, direct: Direct, options: dict[str, Any]) -> None:
    ids = tokens(1, 6)
    with record_routing(routed) as record:
        out = routed.generate(ids, max_new_tokens=5, do_sample=False, guidance_scale=1.5, **options)[0]
    assert_is(record.sequence(0), routed, out[:-1], direct)
    assert_is(record.sequence(1), routed, out[5:-1], direct)  # the last token of the prompt, and what was written
    assert record.kept == 10 + 5


@pytest.mark.parametrize("spilled", [False, True])
def test_parts_are_those_of_their_moment_and_nobody_waits_for_their_reader(
    routed: Any, tmp_path: Path, spilled: bool
) -> None:
    with record_routing(routed, max_tokens=10, spill=tmp_path / "record" if spilled else None) as record:
        routed(tokens(1, 8, seed=1))
        before, parts = record.scalings, record.parts()
        other = threading.Thread(target=lambda: routed(tokens(1, 2 if not spilled else 9, seed=2)))
        other.start()
        other.join(60)
        assert not other.is_alive()
        assert_close(torch.cat([part.scalings for part in parts]), before)
        assert record.kept == (10 if not spilled else 17)


def test_a_record_outlives_its_model_and_does_not_keep_it(experts: Any) -> None:
    model = mixture(experts("llama"))
    with record_routing(model) as record:
        model.generate(tokens(1), max_new_tokens=3, do_sample=False)
    gone = weakref.ref(model.internal_xlora_classifier)
    del model
    gc.collect()
    assert gone() is None
    assert record.kept == 11


def test_a_compiled_model_is_recorded_between_its_graphs(experts: Any) -> None:
    code = COMPILED.format(path=sys.path, experts=experts("llama"))  # where shapes are not checked: not compilable
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_embeddings_have_no_token_ids(routed: Any, direct: Direct) -> None:
    ids = tokens(1)
    with record_routing(routed) as record:
        routed(inputs_embeds=routed.get_input_embeddings()(ids))
    assert record.tokens.tolist() == [-1] * 9
    assert record.pieces() == ["#-1"] * 9
    assert_close(record.scalings, direct(routed, ids[0]))


def test_models_that_make_no_scalings_say_so(routed: Any, tmp_path: Any) -> None:
    base = llama()
    plain = loramix.get_peft_model(base, loramix.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model in (plain, torch.nn.Linear(2, 2), torch.nn.Sequential(routed)):
        with pytest.raises(UnsupportedOperationError, match="Only a mixture makes scalings"), record_routing(model):
            pass
    with pytest.raises(RoutingError, match="routing is fixed"), routed.disable_adapter(), record_routing(routed):
        pass
    with pytest.raises(RoutingError, match="unfix_routing"), routed.fixed_scalings([1.0, 0, 0]), record_routing(routed):
        pass
    assert routed._loramix.hooks == ()
    with record_routing(routed) as record, routed.disable_adapter():
        routed(tokens(1))
    assert "Nothing was recorded" in repr(record)
    assert record.to_pandas().empty
    with pytest.raises(RoutingError, match="recorded tokens"):
        record.metrics()
    for options in ({"max_tokens": 0}, {"max_tokens": True}, {"seed": -1}, {"seed": 2**70}):
        with pytest.raises(ConfigurationError, match="must be a whole number"), record_routing(routed, **options):
            pass
    with pytest.raises(UnsupportedOperationError, match="a NoneType without a router"), record_routing(None):
        pass


def test_routing_that_is_fixed_after_some_tokens_is_recorded_until_then(routed: Any, direct: Direct) -> None:
    routed.fix_routing(after=4)
    try:
        with record_routing(routed) as record:
            out = routed.generate(tokens(1), max_new_tokens=10, do_sample=False, lockstep=True)
    finally:
        routed.unfix_routing()
    assert_holds(record, routed, [out[0, : 9 + 4]], direct)


@torch.no_grad()
def test_one_expert_and_sixty_four(tmp_path: Any, direct: Direct) -> None:
    base = llama()
    names = [f"expert {i}" for i in range(64)]
    one = {
        name: save_expert(tmp_path / name, base, seed=i, r=1, target_modules=["q_proj"]) for i, name in enumerate(names)
    }
    for some in (names[:1], names):
        model = mixture({name: one[name] for name in some}, layerwise_scalings=True)
        with record_routing(model) as record:
            model(tokens(1))
        assert_holds(record, model, [tokens(1)[0]], direct)
        assert record.experts == some
        assert record.metrics().tokens == 9


@torch.no_grad()
def test_a_cache_that_becomes_a_plain_one_is_let_go(experts: Callable[[str], dict[str, str]]) -> None:
    model = mixture(experts("llama"))
    with record_routing(model) as record:
        cache = model(tokens(1), use_cache=True).past_key_values
        cache.reset()
        with model.disable_adapter():
            model(tokens(1), past_key_values=cache)
    assert record.kept == 9
    model.fix_routing(after=3)
    with record_routing(model) as record:
        out = model.generate(tokens(1), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == 16
    assert record.kept == 9 + 3
    assert not model._loramix.hooks


@torch.no_grad()
@pytest.mark.parametrize("lockstep", [True, 5, "lookup", False])
def test_a_record_that_begins_within_a_generation_counts_from_its_prompt(routed: Any, lockstep: Any) -> None:
    from contextlib import ExitStack

    records: list[RoutingRecord] = []
    with ExitStack() as stack:

        def begin(ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] == 13:
                records.append(stack.enter_context(record_routing(routed)))
            return scores

        routed.generate(tokens(1), max_new_tokens=12, do_sample=False, lockstep=lockstep, logits_processor=[begin])
    assert records[0].positions.tolist() == list(range(13, 20))


@torch.no_grad()
def test_what_a_user_crops_has_been_read(routed: Any) -> None:
    for look in (False, True):
        with record_routing(routed) as record:
            cache = routed(tokens(1), use_cache=True).past_key_values
            routed(tokens(1, 5, seed=1), past_key_values=cache)
            if look:
                assert record.kept == 14
            cache.crop(-5)
            routed(tokens(1, 5, seed=2), past_key_values=cache)
        assert record.seen == record.kept == 19
        assert record.header.forks == {1: (0, 9)}


@torch.no_grad()
@pytest.mark.parametrize("wanted", [5, "lookup"])
def test_nothing_is_read_ahead_of_a_record(routed: Any, direct: Direct, wanted: Any) -> None:
    with record_routing(routed) as record, record_routing(routed) as other:
        out = routed.generate(tokens(1), max_new_tokens=12, do_sample=False, lockstep=wanted)
    assert set(routed.lockstep_report.rounds) == {"lockstep"}
    for found in (record, other):
        assert_holds(found, routed, [out[0, :-1]], direct)


class _Marks(StoppingCriteria):
    """A row finishes once it holds so many tokens: other rows at other lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lockstep", [True, False])
def test_rows_finish_by_what_generate_knows_not_by_their_tokens(
    routed: Any, direct: Direct, cached: bool, lockstep: bool
) -> None:
    ids = tokens(3)
    free = routed.generate(ids, max_new_tokens=10, do_sample=False)
    padding = int(free[0, 9 + 2])  # row 0 chooses the padding in the middle of its text
    assert padding not in free[1, 9:14].tolist()
    options: dict[str, Any] = {"do_sample": False, "lockstep": lockstep and cached, "use_cache": cached}
    with record_routing(routed) as record:
        out = routed.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            eos_token_id=127,
            pad_token_id=padding,
            stopping_criteria=[_Marks([99, 13, 99])],  # and row 1 is stopped by another criterion
            **options,
        )
    assert out[1, 13:].tolist() == [padding] * 6
    assert_holds(record, routed, [out[0, :-1], out[1, :13], out[2, :-1]], direct)


@pytest.mark.parametrize("cached", [True, False])
def test_reading_within_a_generation_shows_only_what_stays(routed: Any, direct: Direct, cached: bool) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    seen: list[int] = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        assert not record.is_sample
        assert record.tokens.tolist() == ids[0, : record.kept].tolist()
        seen.append(record.seen)
        return scores

    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3} if cached else {"use_cache": False}
    with record_routing(routed) as record:
        out = routed.generate(ids, max_new_tokens=16, do_sample=False, logits_processor=[look], **options)
        assert record.kept == record.seen
    assert seen == sorted(seen)
    assert seen[-1] > 10
    assert_is(record, routed, out[0, : record.seen], direct)


@torch.no_grad()
def test_copies_of_a_cache_keep_no_record_alive(routed: Any) -> None:
    with record_routing(routed) as record:
        cache = routed(tokens(1), use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
    gone = weakref.ref(record)
    del record
    gc.collect()
    assert gone() is None
    twin.crop(-2)
    twin.batch_repeat_interleave(2)
    assert routed(tokens(2, 3), past_key_values=twin).logits.shape[:2] == (2, 3)


def test_an_experiment_is_not_recorded(routed: Any, direct: Direct) -> None:
    text = tokens(1)[0]
    with record_routing(routed) as record:
        worth = leave_one_out(routed, [text.tolist()])
    assert len(worth.without) == 3
    assert_holds(record, routed, [text], direct)


@torch.no_grad()
def test_a_model_that_is_copied_or_moved_within_a_record(routed: Any, direct: Direct) -> None:
    with record_routing(routed) as record:
        twin = copy.deepcopy(routed)
        twin(tokens(1, seed=3))
        routed.to("cpu")
        routed(tokens(1))
    assert twin._loramix.hooks == ()
    assert_holds(record, routed, [tokens(1)[0]], direct)
