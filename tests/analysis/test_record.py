"""A record is sliced, tabulated, saved and read; what does not fit is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from loramix import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    LoramixError,
    RoutingError,
    SaveError,
    UnsupportedOperationError,
)
from loramix.analysis import (
    Inspection,
    RoutingRecord,
    agreement,
    confusion,
    drift,
    plots,
    record_routing,
    stream_routing,
)
from loramix.analysis.metrics import RoutingMeter
from support.byte_tokenizer import byte_tokenizer
from support.records import random_record, record_of
from support.tiny import tokens


def equal(one: RoutingRecord, other: RoutingRecord) -> bool:
    parts = zip(vars(one.part).values(), vars(other.part).values(), strict=True)
    return vars(one.header) == vars(other.header) and all(torch.equal(a, b) for a, b in parts)


def test_a_table_has_a_row_for_each_token_layer_and_expert() -> None:
    record = random_record(6, texts=[4, 2], tokens=[7, 8, 9, 7, 8, 9])
    table = record.to_pandas()
    assert list(table.columns) == ["sequence", "position", "token", "layer", "expert", "scaling"]
    assert len(table) == 6 * 4 * 3
    for i in range(6):
        rows = table[(table.sequence == (0 if i < 4 else 1)) & (table.position == (i if i < 4 else i - 4))]
        assert set(rows.token) == {7 + i % 3}
        for layer, name in enumerate(record.layers):
            for expert, who in enumerate(record.experts):
                (value,) = rows[(rows.layer == name) & (rows.expert == who)].scaling
                assert value == float(record.scalings[i, layer, expert])
    means = table.groupby("expert", observed=True).scaling.mean()
    assert means.to_list() == pytest.approx(record.metrics().importance, abs=1e-6)


def test_a_table_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UnsupportedOperationError, match=r"pip install 'loramix\[inspect\]'"):
        random_record().to_pandas()


@pytest.mark.parametrize("parts", [1, 3])
def test_slices_are_what_indexing_gives(parts: int) -> None:
    record = random_record(12, texts=[7, 5], parts=parts)
    scalings = record.scalings
    assert torch.equal(record.select(experts="e1").scalings, scalings[:, :, 1:2])
    assert torch.equal(record.select(experts=["e2", 0]).scalings, scalings[:, :, [2, 0]])
    assert record.select(experts=["e2", 0]).experts == ["e2", "e0"]
    assert record.select(experts=-1).palette == ["e0", "e1", "e2"]
    assert record.select(layers="*q_proj").layers == ["layers.0.q_proj", "layers.1.q_proj"]
    assert torch.equal(record.select(layers=slice(1, 3)).scalings, scalings[:, 1:3])
    assert torch.equal(record.select(layers=["layers.1.*", 1, "*.v_proj"]).scalings, scalings[:, [2, 3, 1]])
    assert torch.equal(record.select(sequences=1).scalings, scalings[7:])
    assert torch.equal(record.select(sequences=[1, 0]).scalings, scalings)
    assert torch.equal(record.select(tokens=slice(2, 6, 3)).scalings, scalings[[2, 5, 9]])
    assert torch.equal(record.select(tokens=0).scalings, scalings[[0, 7]])
    assert torch.equal(record.select(tokens=[0, 6]).scalings, scalings[[0, 6, 7]])
    chosen = record.tokens % 2 == 0
    assert torch.equal(record.select(tokens=chosen).scalings, scalings[chosen])
    both = record.select(tokens=chosen, layers=0, experts=[0, 1], sequences=0)
    assert torch.equal(both.scalings, scalings[:7][chosen[:7]][:, :1, :2])
    assert (both.seen, both.kept, both.is_sample) == (4, 4, False)


def test_a_selection_of_a_sample_is_a_sample() -> None:
    record = random_record()
    record.header.seen = 100
    assert record.is_sample
    assert record.select(experts=0).is_sample
    assert "of a sample" in record.select(experts=0).note


def test_what_nothing_matches_is_an_error_that_lists_what_there_is() -> None:
    record = random_record()
    for options in ({"experts": "maths"}, {"experts": 3}, {"layers": ["*q_proj", "*k_proj"]}, {"experts": slice(5, 9)}):
        with pytest.raises(RoutingError, match="selected by its number, its name or a pattern"):
            record.select(**options)
    for places in (-1, slice(-3, None), [1, -1], slice(None, None, -1)):
        with pytest.raises(RoutingError, match="from the beginning"):
            record.select(tokens=places)
    with pytest.raises(RoutingError, match="one value for each recorded token"):
        record.select(tokens=torch.ones(3, dtype=torch.bool))
    with pytest.raises(RoutingError, match="named by its number"):
        record.sequence(5)


def test_shared_scalings_have_no_layers_to_tell_apart() -> None:
    record = random_record(layers=1, shared=True)
    assert record.layers == ["all layers"]
    with pytest.raises(RoutingError, match="one routing that all 4 layers share"):
        record.select(layers=0)
    assert set(record.to_pandas().layer) == {"all layers"}
    assert list(record.metrics_by_layer()) == ["all layers"]


def test_masks_and_numbers_may_be_lists_or_arrays() -> None:
    record = random_record(12, texts=[5, 7])
    wanted = record.positions == 3
    for mask in (wanted, wanted.tolist(), wanted.numpy()):
        assert record.select(tokens=mask).positions.tolist() == [3, 3]
    assert record.select(tokens=np.array([1, 2])).positions.tolist() == [1, 2, 1, 2]
    assert record.select(tokens=np.int64(4), sequences=np.array([1])).sequences == [1]
    assert record.select(layers=np.int64(1), experts=torch.tensor([2, 0])).experts == ["e2", "e0"]
    assert record.select(sequences=(0, 1)).kept == 12


@pytest.mark.parametrize("wrong", [True, [True, 1], torch.tensor([0.5]), torch.ones(1, 12) > 0, torch.ones(2, 2)])
def test_tokens_that_are_neither_positions_nor_a_mask_are_refused(wrong: Any) -> None:
    with pytest.raises(RoutingError, match="a mask of shape"):
        random_record(12).select(tokens=wrong)
    with pytest.raises(RoutingError):
        random_record(12).select(experts=wrong)


@pytest.mark.parametrize("what", ["tokens", "layers", "experts", "sequences"])
@pytest.mark.parametrize(
    "wrong",
    [
        *(True, [True, 0], 2**70, [2**70], torch.tensor(1.5), torch.tensor([0, 1.5]), np.array([None])),
        *(slice("a", "b"), slice(1.5, 3), slice(0, 5, 0), slice(0, 2**70)),
    ],
    ids=repr,
)
def test_what_picks_nothing_is_refused_by_every_part_of_a_selection(what: str, wrong: Any) -> None:
    with pytest.raises(RoutingError, match="made by whole numbers"):
        random_record(12).select(**{what: wrong})


@pytest.mark.parametrize("wrong", ["0", [0, "1"], [True] * 12, torch.ones(12) > 0])
def test_texts_have_numbers_and_no_names(wrong: Any) -> None:
    with pytest.raises(RoutingError, match="made by whole numbers"):
        random_record(12, texts=[5, 7]).select(sequences=wrong)


@pytest.mark.parametrize("wrong", [2**70, -1, True, torch.tensor([0]), torch.tensor(0.5)], ids=repr)
def test_a_text_is_named_by_one_number(wrong: Any) -> None:
    record = random_record(12, texts=[5, 7])
    with pytest.raises(RoutingError):
        record.sequence(wrong)
    assert record.sequence(np.int64(1)).kept == record.sequence(torch.tensor(1)).kept == 7


def test_a_text_is_found_by_one_row_of_ids() -> None:
    record = random_record(12, texts=[5, 7])
    for row in ([5, 6, 7], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), np.array([5, 6, 7])):
        assert record.following(row).tokens.tolist() == [5, 6, 7]
    for wrong in (torch.tensor([[5, 6], [5, 6]]), torch.tensor([5.0]), torch.tensor([True]), torch.tensor(5)):
        with pytest.raises(RoutingError, match=r"row of token ids|whole numbers"):
            record.following(wrong)
    with pytest.raises(RoutingError, match="0 tokens, in no text"):
        record.following([])


def test_scalings_that_are_no_numbers_are_neither_measured_nor_shown() -> None:
    scalings = torch.full((3, 2, 2), 0.5)
    scalings[1, 0, 1] = torch.nan
    record = record_of(scalings)
    calls = [
        *(RoutingRecord.metrics, RoutingRecord.metrics_by_layer, agreement, lambda record: drift(record, record)),
        *(lambda record: confusion(record, {0: "a"}), lambda record: Inspection(record).to_dict()),
        *(plots.load_bars, plots.tokens_by_experts, plots.layers_by_experts, plots.entropy_along),
    ]
    for call in calls:
        with pytest.raises(RoutingError, match="finite numbers"):
            call(record)
    assert "finite numbers" in record._repr_html_()
    assert record.to_pandas().scaling.isna().sum() == 1
    assert record.select(sequences=0, experts=0).metrics().tokens == 3
    meter = RoutingMeter()
    meter.add(scalings[None])
    found = meter.result()
    assert found is not None
    assert np.isnan(found.information)


def test_texts_are_picked_by_slices_too() -> None:
    record = random_record(12, texts=[3, 4, 5])
    assert record.select(sequences=slice(1, None)).sequences == [1, 2]
    assert record.select(sequences=slice(0, 3, 2)).sequences == [0, 2]
    with pytest.raises(RoutingError, match="from the beginning"):
        record.select(sequences=slice(-1, None))


@pytest.mark.parametrize(
    "nothing",
    [{"sequences": 99}, {"tokens": "zzz*"}, {"tokens": 500}, {"tokens": [False] * 12}, {"tokens": 6, "sequences": [0]}],
)
def test_a_selection_of_nothing_is_an_error(nothing: dict[str, Any]) -> None:
    record = random_record(12, texts=[5, 7])
    with pytest.raises(RoutingError, match="at least one token"):
        record.select(**nothing)
    empty = record_of(torch.zeros(0, 2, 2))
    assert empty.select(tokens=slice(0, 5)).kept == 0


def test_a_record_that_was_saved_over_is_not_read_as_the_earlier_one(tmp_path: Path) -> None:
    record = random_record(12, texts=[5, 7])
    for other in (record.select(sequences=1), random_record(12, texts=[5, 7], seed=1)):
        record.save(tmp_path)
        loaded = RoutingRecord.load(tmp_path)
        other.save(tmp_path)
        with pytest.raises(CorruptCheckpointError, match="a file of another record"):
            _ = loaded.scalings
        assert equal(RoutingRecord.load(tmp_path), other)
    record.save(tmp_path / "another")
    (tmp_path / "another" / "tokens-00000.safetensors").replace(tmp_path / "tokens-00000.safetensors")
    with pytest.raises(CorruptCheckpointError, match="a file of another record"):
        RoutingRecord.load(tmp_path)


@pytest.mark.parametrize("wrong", ["gpt2", 7])
def test_what_is_no_tokenizer_is_refused_before_anything_is_recorded(wrong: Any, routed: Any, tmp_path: Path) -> None:
    random_record(2).save(tmp_path)
    with pytest.raises(RoutingError, match="by a tokenizer"):
        RoutingRecord.load(tmp_path, wrong)
    with pytest.raises(RoutingError, match="by a tokenizer"), record_routing(routed, wrong):
        pass
    with pytest.raises(RoutingError, match="by a tokenizer"), stream_routing(routed, wrong):
        pass


def test_colours_by_other_names_go_with_the_record_wherever_it_goes(routed: Any, tmp_path: Path) -> None:
    names = ["prose", "other", "code", "math"]
    with record_routing(routed) as record:
        coloured = record.coloured_by(names)
        routed(tokens(1, 4))
        assert (coloured.kept, coloured.seen) == (4, 4)
        routed(tokens(1, 5))
    assert (coloured.kept, coloured.note) == (9, record.note)
    coloured.save(tmp_path)
    for found in (coloured, coloured.select(experts="code"), coloured.sequence(1), RoutingRecord.load(tmp_path)):
        assert found.palette == names
    assert record.palette == routed.expert_names
    with pytest.raises(RoutingError, match="names without 'math', 'prose': 'code'"):
        record.coloured_by(["code"])
    for unordered in (dict.fromkeys(names).keys(), ",".join(names)):
        with pytest.raises(RoutingError, match="place among all names"):
            RoutingRecord.coloured_by.__wrapped__(record, unordered)  # where types are not checked


def test_one_of_a_kind_is_told_as_one() -> None:
    assert record_of(torch.ones(1, 1, 1)).note == "1 token, 1 expert, 1 layer."


def test_the_pieces_of_a_run_add_up_also_where_tokens_are_half_a_character() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve – 漢字 🙂 x"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    record = record_of(torch.ones(len(ids), 1, 2), tokens=ids, tokenizer=tokenizer)
    pieces = record.pieces()
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    half = record.select(tokens=slice(0, 3))  # ends in the middle of ï
    assert half.pieces() == ["n", "a", "�"]
    assert len(record.select(tokens="[xï]")) == 2
    assert record.select(tokens="x").tokens.tolist() == [ids[-1]]


def test_the_whole_text_follows_its_forks() -> None:
    record = record_of(torch.ones(9, 1, 2), texts=[4, 3, 2])
    record.header.forks.update({1: (0, 2), 2: (1, 3)})
    sequence = record.source.parts().__next__()
    sequence.position[4:] = torch.tensor([2, 3, 4, 3, 4])
    assert record.sequence(0).tokens.tolist() == [0, 1, 2, 3]
    assert record.sequence(1).tokens.tolist() == [0, 1, 4, 5, 6]
    assert record.sequence(2).tokens.tolist() == [0, 1, 4, 7, 8]
    assert record.sequence(2).positions.tolist() == [0, 1, 2, 3, 4]
    assert record.following([0, 1, 4, 7, 8, 99]).tokens.tolist() == [0, 1, 4, 7, 8]
    assert record.following([0, 1, 4]).tokens.tolist() == [0, 1, 4]
    for wanted in ([0, 1, 9], [0, 1, 4, 7, 8, 99, 98], [4, 5]):
        with pytest.raises(RoutingError, match="no text of the record"):
            record.following(wanted)


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_saved_is_read_back(tmp_path: Path, parts: int) -> None:
    tokenizer = byte_tokenizer()
    record = random_record(9, texts=[5, 4], tokenizer=tokenizer, parts=parts)
    record.header.forks[1] = (0, 3)
    record.save(tmp_path / "record")
    found = RoutingRecord.load(tmp_path / "record")
    assert equal(found, record)
    assert found.vocabulary() == record.vocabulary()
    assert found.metrics() == record.metrics()
    other = random_record(3, seed=1)
    other.save(tmp_path / "record")  # over it, with fewer files
    assert equal(RoutingRecord.load(tmp_path / "record"), other)
    found = RoutingRecord.load(tmp_path / "record")
    found.save(tmp_path / "record")  # from where it lies to where it lies
    assert equal(RoutingRecord.load(tmp_path / "record"), other)
    assert equal(found, other)
    assert sorted(path.name for path in (tmp_path / "record").iterdir()) == ["record.json", "tokens-00000.safetensors"]


def test_another_mixtures_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    record = random_record(4, tokens=tokenizer("abcd")["input_ids"], tokenizer=tokenizer)
    record.save(tmp_path)
    assert RoutingRecord.load(tmp_path, tokenizer).pieces() == record.pieces()
    path = tmp_path / "record.json"
    content = json.loads(path.read_text())
    token = next(iter(content["pieces"]))
    content["pieces"][token] = " another word"
    path.write_text(json.dumps(content))
    with pytest.raises(RoutingError, match=f"to which token {token} is .* ' another word'"):
        RoutingRecord.load(tmp_path, tokenizer)
    assert RoutingRecord.load(tmp_path).pieces()[0] == " another word"


def test_an_empty_record_is_saved_too(tmp_path: Path) -> None:
    record = random_record(0, texts=[0], parts=1)
    record.save(tmp_path)
    assert RoutingRecord.load(tmp_path).kept == 0


INDEX: dict[str, Any] = {
    "another format": {"format": "something"},
    "a later version": {"version": 2},
    "no experts": {"experts": []},
    "names that are none": {"layers": [1, 2]},
    "another number of experts": {"experts": ["a"]},
    "a file elsewhere": {"shards": [{"file": "../tokens-00000.safetensors", "tokens": 9}]},
    "another number of tokens": {"shards": [{"file": "tokens-00000.safetensors", "tokens": 8}]},
    "no shards": {"shards": None},
    "an expert without a colour": {"palette": ["e0", "e1"]},
    "fewer tokens than none": {"seen": -1},
    "forks in a circle": {"forks": {"0": [1, 1], "1": [0, 1]}},
    "a fork of no text": {"forks": {"1": [-1, 5]}},
    "a fork before the beginning": {"forks": {"1": [0, -5]}},
    "fewer tokens seen than kept": {"seen": 8},
    "half a token seen": {"seen": 9.5},
    "an expert twice": {"experts": ["e0", "e0", "e1"]},
    "shards by name": {"shards": {}},
}


@pytest.mark.parametrize("what", INDEX)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, what: str) -> None:
    random_record(9).save(tmp_path)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | INDEX[what]))
    with pytest.raises(CorruptCheckpointError, match="remedy"):
        RoutingRecord.load(tmp_path)


def test_files_that_are_damaged_missing_or_foreign_are_refused(tmp_path: Path) -> None:
    random_record(9).save(tmp_path)
    shard = tmp_path / "tokens-00000.safetensors"
    whole = shard.read_bytes()
    tensors = load_file(shard)
    for content in (b"", whole[:-8], whole[:20]):
        shard.write_bytes(content)
        with pytest.raises(CorruptCheckpointError):
            RoutingRecord.load(tmp_path)
    for change in (
        {"extra": torch.ones(1)},
        {"scalings": tensors["scalings"].half()},
        {"scalings": tensors["scalings"][:, 0].contiguous()},
        {"token": tensors["token"].int()},
        {"position": tensors["position"][:-1]},
    ):
        save_file(tensors | change, shard)
        with pytest.raises(CorruptCheckpointError):
            RoutingRecord.load(tmp_path)
    shard.unlink()
    with pytest.raises(IncompleteCheckpointError, match="no tokens-00000"):
        RoutingRecord.load(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(CorruptCheckpointError):
        RoutingRecord.load(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"record\.json"):
        RoutingRecord.load(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError):
        random_record().save(tmp_path / "file" / "record")


def test_a_save_that_stops_leaves_the_earlier_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = random_record(9)
    record.save(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("loramix.analysis.record.shards.write_tensors", fail)
    with pytest.raises(LoramixError, match="no room"):
        random_record(4).save(tmp_path)
    assert equal(RoutingRecord.load(tmp_path), record)


def test_it_says_what_it_holds() -> None:
    record = random_record(9)
    assert repr(record) == "<RoutingRecord: 9 tokens, 3 experts, 4 layers.>"
    assert len(record) == 9
    assert_close(record.weights, record.scalings.mean(1))
    assert torch.equal(record.leading, record.weights.argmax(-1))
