"""Text from files, and every way in which it can be wrong: named by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loramix import DataError
from loramix.training import ExpertLabels, read_rows
from training.conftest import write_lines

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
    found = {row.content["text"]: row.expert for row in read_rows(tmp_path, ["math"])}
    assert found == {"math/a.txt": "math", "math/deep/b.md": "math", "law/c.txt": None, "d.txt": None, "row": None}
    assert {row.expert for row in read_rows(tmp_path)} == {"math", "law", None}


BAD_LINES = {
    "no JSON": ("{", "line 2"),
    "no object": ("[1]", "a list"),
    "no column": ('{"body": "x"}', "the columns body"),
    "an empty text": ('{"text": ""}', "text=''"),
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


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        if name == "user/missing":
            raise FileNotFoundError("Couldn't find\nit")
        return [{"text": "x", "expert": "math"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read_rows("user/data", split="test")
    assert (row.content, row.expert, row.source) == ({"text": "x"}, "math", "user/data, row 0")
    with pytest.raises(DataError, match="Couldn't find it"):
        read_rows("user/missing")
    assert asked == [("user/data", "test"), ("user/missing", "train")]


def test_labels_become_numbers() -> None:
    def collate(rows: Any) -> dict[str, torch.Tensor]:
        assert all(set(row) == {"input_ids"} for row in rows)
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    collator = ExpertLabels(collate, ["math", "code"])
    batch = collator([{"input_ids": [1], "expert": "code"}, {"input_ids": [2], "expert": None}, {"input_ids": [3]}])
    assert batch["expert_ids"].tolist() == [1, -1, -1]
    with pytest.raises(DataError, match="'law'"):
        collator([{"input_ids": [1], "expert": "law"}])
