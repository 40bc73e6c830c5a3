"""Of what `generate` reads, each text is recorded once: without padding, rejected candidates and drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

from loramix.analysis import RoutingRecord, record_routing
from support.recorded import PADDING, Direct, assert_holds, assert_is
from support.tiny import tokens
from support.versions import needs_transformers


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


@pytest.mark.parametrize("padding", [0, "the end"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lockstep", [True, False])
def test_rows_that_have_finished_are_not_recorded_any_more(
    routed: Any, direct: Direct, padding: Any, cached: bool, lockstep: bool
) -> None:
    ids = tokens(3)
    free = routed.generate(ids, max_new_tokens=10, do_sample=False)
    end = next(
        token for token in free[0, 9 : 9 + 4].tolist() if token not in free[1, 9:].tolist()
    )  # row 0 stops, row 1 does not
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


@needs_transformers(5, 18, "prompt lookup needs an end token")
def test_candidates_that_were_rejected_are_taken_back(routed: Any, direct: Direct) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with record_routing(routed) as record:
        out = routed.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3)
    read = record.seen
    assert_is(record, routed, out[0, :read], direct)
    assert read >= out.shape[1] - 4


@pytest.mark.parametrize(
    "itself",
    [
        pytest.param(
            False, marks=needs_transformers(5, 8, "a model that exits early to draft for itself stops with a TypeError")
        ),
        True,
    ],
    ids=["early exit", "assistant"],
)
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


def test_routing_that_is_fixed_after_some_tokens_is_recorded_until_then(routed: Any, direct: Direct) -> None:
    routed.fix_routing(after=4)
    try:
        with record_routing(routed) as record:
            out = routed.generate(tokens(1), max_new_tokens=10, do_sample=False, lockstep=True)
    finally:
        routed.unfix_routing()
    assert_holds(record, routed, [out[0, : 9 + 4]], direct)


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
@pytest.mark.parametrize("lockstep", [5, "lookup"])
def test_nothing_is_read_ahead_of_a_record(routed: Any, direct: Direct, lockstep: Any) -> None:
    with record_routing(routed) as record, record_routing(routed) as other:
        out = routed.generate(tokens(1), max_new_tokens=12, do_sample=False, lockstep=lockstep)
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


@pytest.mark.parametrize(
    "cached",
    [
        pytest.param(True, marks=needs_transformers(5, 18, "prompt lookup needs an end token")),
        False,
    ],
)
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
