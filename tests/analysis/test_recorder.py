"""However a text is read, its record holds what one forward over all of it gives, each token once."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, Trainer, TrainingArguments

from loramix.analysis import record_routing
from loramix.passes.state import state_of
from support.mixtures import mixture
from support.recorded import PADDING, Direct, assert_holds, assert_is
from support.tiny import ARCHITECTURES, tokens


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_architecture(architecture: str, experts: Any, direct: Direct) -> None:
    model = mixture(experts(architecture), architecture, layerwise_scalings=True)
    with record_routing(model) as record:
        out = model.generate(tokens(2), attention_mask=PADDING, max_new_tokens=8, do_sample=False)
    assert_holds(record, model, [out[0, 3:-1], out[1, :-1]], direct)


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


@pytest.mark.slow
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
    assert not state_of(model).hooks


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
