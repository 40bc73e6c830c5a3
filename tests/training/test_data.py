"""Text from files, and every way in which it can be wrong: named by file and line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from loramix import DataError
from loramix.training import ExpertLabels, Row, read_rows
from loramix.training.dataset import pieces, to_dataset
from support.byte_tokenizer import byte_tokenizer
from support.training_files import write_lines

MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


class Template:
    """A tokenizer that can write conversations."""

    chat_template = "yes"

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        return "|".join(message["content"] for message in messages)


class Plain:
    chat_template = None


def test_lines_with_and_without_an_expert(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x", "expert": "math"}, {"text": "y", "other": 1}])
    path.write_text(path.read_text() + "\n\n")
    rows = read_rows(path, ["math"])
    assert [(row.content, row.expert) for row in rows] == [({"text": "x"}, "math"), ({"text": "y"}, None)]
    assert rows[1].source == f"{path}, line 2"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "x"}, "x"),
        ({"messages": MESSAGES}, "2 + 2?|4"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 = 4"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "2 + 2?|4"),
    ],
)
def test_every_format_is_a_text(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    (found,) = read_rows(write_lines(tmp_path / "a.jsonl", [row]))
    assert found.as_text(Template()) == text
    if isinstance(next(iter(row.values())), list):
        with pytest.raises(DataError, match="chat template"):
            found.as_text(Plain())


def test_a_folders_subfolders_are_experts_where_the_mixture_has_them(tmp_path: Path) -> None:
    for name in ("math/a.txt", "math/deep/b.md", "law/c.txt", "d.txt", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text(" \n")
    write_lines(tmp_path / "rows.jsonl", [{"text": "row"}])
    write_lines(tmp_path / "math" / "rows.jsonl", [{"text": "own"}, {"text": "other", "expert": "code"}])
    found = {row.content["text"]: row.expert for row in read_rows(tmp_path, ["math", "code"])}
    assert found == {
        "math/a.txt": "math",
        "math/deep/b.md": "math",
        "law/c.txt": None,
        "d.txt": None,
        "row": None,
        "own": "math",
        "other": "code",
    }
    assert {row.expert for row in read_rows(tmp_path)} == {"math", "law", "code", None}


def test_lines_end_where_json_says_and_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two\u0085"}\r\n{"text": "three"}\n', encoding="utf-8-sig")
    assert [row.content["text"] for row in read_rows(path)] == ["one\u2028two\u0085", "three"]


BAD_LINES = {
    "no JSON": ("{", "line 2"),
    "no object": ("[1]", "a list"),
    "no column": ('{"body": "x"}', "the columns body"),
    "an empty text": ('{"text": ""}', "text=''"),
    "a blank text": ('{"text": " \\n"}', "text=' "),
    "messages that are none": ('{"messages": [1, "a"]}', "messages=[1"),
    "messages without a role": ('{"messages": [{"content": "x"}]}', "messages=["),
    "a text of messages": ('{"text": [{"role": "user", "content": "x"}]}', "text=["),
    "a prompt of one kind and a completion of the other": (
        '{"prompt": "x", "completion": [{"role": "assistant", "content": "x"}]}',
        "prompt='x'",
    ),
    "a text that is none": ('{"text": 3}', "text=3"),
    "no messages": ('{"messages": []}', "messages=[]"),
    "an expert that is no name": ('{"text": "x", "expert": 3}', "expert=3"),
    "an unknown expert": ('{"text": "x", "expert": "law"}', "'law'"),
    "another format": ('{"messages": [{"role": "user", "content": "x"}]}', "text at"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    line, said = BAD_LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_rows(path, ["math"])
    assert f"{path}, line 2" in caught.value.received
    assert said in caught.value.received


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "nowhere"])
def test_nothing_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_rows(name)


def test_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    for place in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(DataError, match="at least one text"):
            read_rows(place)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        read_rows(tmp_path)


READS = """
import json, sys
from pathlib import Path
import datasets
from loramix import DataError
from loramix.training import read_rows

lines = Path(sys.argv[1])
datasets.load_dataset("json", data_files={"test": str(lines)})
cache = Path(datasets.config.HF_DATASETS_CACHE)
made = next(cache.glob("json/*/*/*/dataset_info.json")).parent
kept = cache / "user___data" / "few" / "0.0.0" / ("a" * 40)
kept.parent.mkdir(parents=True)
made.rename(kept)
(kept / "json-test.arrow").rename(kept / "data-test.arrow")
info = json.loads((kept / "dataset_info.json").read_text())
(kept / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "data", "config_name": "few"}))
for options in ({"split": "test"}, {"split": "test", "subset": "few"}):
    print(json.dumps([[row.content, row.expert, row.source] for row in read_rows("user/data", **options)]))
for name, options in (("user/missing", {}), ("user/data", {"split": "train"}), ("user/data", {"subset": "other"})):
    try:
        read_rows(name, **options)
    except DataError as error:
        print(error.received)
"""


def test_a_data_set_of_the_hub_is_read_from_its_cache(tmp_path: Path) -> None:
    """The `datasets` library itself, offline, with a data set of the Hub as it lies in the cache."""
    file = write_lines(tmp_path / "data.jsonl", [{"text": "x", "expert": "math"}, {"text": "y", "expert": None}])
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READS, str(file)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    rows, same, *errors = done.stdout.splitlines()
    assert json.loads(rows) == [[{"text": "x"}, "math", "user/data, row 0"], [{"text": "y"}, None, "user/data, row 1"]]
    assert same == rows
    assert [error.partition(":")[0] for error in errors] == [
        "'user/missing', split 'train'",
        "'user/data', split 'train'",
        "'user/data', split 'train'",
    ]


@pytest.mark.parametrize("size", [2, 3, 5, 64, None])
def test_long_text_is_cut_and_every_token_but_the_first_is_predicted_once(size: int | None) -> None:
    tokenizer = byte_tokenizer()
    text = "a long text, and none of it lost"
    found = pieces(Row({"text": text}, None, "here"), tokenizer, size)
    predicted = [token for piece in found for token in piece[1:]]
    assert predicted == [*tokenizer(text)["input_ids"][1:], tokenizer.eos_token_id]
    assert all(2 <= len(piece) <= (size or 99) for piece in found)
    assert all(one[-1] == other[0] for one, other in pairwise(found))
    rows = to_dataset([Row({"text": text}, "math", "here")], tokenizer, size, labels=True)
    assert rows.to_list() == [{"input_ids": piece, "expert": "math"} for piece in found]
    assert set(to_dataset([Row({"text": text}, "math", "here")], tokenizer, size).column_names) == {"input_ids"}


def test_other_formats_are_left_to_the_trainer() -> None:
    tokenizer = byte_tokenizer()
    row = Row({"prompt": "1 +", "completion": " 1"}, None, "here")
    assert pieces(row, tokenizer, 4) == [tokenizer("1 + 1")["input_ids"][:4]]
    assert to_dataset([row], tokenizer, 4).to_list() == [row.content]


def test_text_that_predicts_nothing_is_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="single token"):
        to_dataset([Row({"text": tokenizer.eos_token}, None, "here")], tokenizer, 8)


def test_labels_become_numbers() -> None:
    def collate(rows: Any) -> dict[str, torch.Tensor]:
        assert all(set(row) == {"input_ids"} for row in rows)
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    collator = ExpertLabels(collate, ["math", "code"])
    batch = collator([{"input_ids": [1], "expert": "code"}, {"input_ids": [2], "expert": None}, {"input_ids": [3]}])
    assert batch["expert_ids"].tolist() == [1, -1, -1]
    with pytest.raises(DataError, match="'law'"):
        collator([{"input_ids": [1], "expert": "law"}])
