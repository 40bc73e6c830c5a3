"""Held-out text that the training text contains is found, and said."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest

from loramix.training.check import check
from loramix.training.data import Row
from loramix.training.overlap import RUN, overlap, warn_of_overlap
from loramix.training.settings import TrainSettings
from support.training_files import Files, write_lines, write_training_files


def text(seed: int, words: int = 120) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(words))


def rows(*texts: Any, source: str = "file") -> list[Row]:
    content = [each if isinstance(each, dict) else {"text": each} for each in texts]
    return [Row(each, None, f"{source}, line {number}") for number, each in enumerate(content, 1)]


def test_runs_are_found_wherever_they_are() -> None:
    training = rows(text(1), text(2), text(3) + "\n\n" + text(4), text(5))
    inside = text(2)[101:]
    found = overlap(rows(inside, text(6), "Zeile für Zeile\n" + text(4).replace(" ", "\n  ")), training)
    assert [(one.source[-1], other.source[-1]) for one, other in found.rows] == [("1", "2"), ("3", "3")]
    lengths = [len(inside), len(text(6)), len(text(4)) + 17]
    assert found.share == pytest.approx((lengths[0] + lengths[2]) / sum(lengths), abs=0.1)
    assert overlap(rows(text(6), text(7)), training).share == 0.0


def test_a_sentence_in_common_is_a_share_and_no_contained_row() -> None:
    common = text(8, 20)
    found = overlap(rows(f"{text(1)} {common} {text(2)}"), rows(f"{text(3)} {common} {text(4)}"))
    assert found.rows == []
    assert found.share < 0.2


def test_short_texts_are_contained_where_they_are_the_same() -> None:
    short = "2 + 2 = 4"
    assert len(short) < RUN
    found = overlap(rows(short, "3 + 3 = 6"), rows("1 + 1 = 2", "2 +  2 = 4\n", f"{short} {text(1)}"))
    assert found.share == 0.5
    assert [(one.source, other.source) for one, other in found.rows] == [("file, line 1", "file, line 2")]


def test_conversations_are_compared_by_what_was_said() -> None:
    said = [{"role": "user", "content": text(1)}, {"role": "assistant", "content": text(2)}]
    found = overlap(rows({"messages": said}), rows({"prompt": text(1), "completion": text(2)}, text(3)))
    assert found.share == 1.0
    assert overlap(rows({"messages": said}), rows(text(3))).share == 0.0


def test_it_says_how_much_and_in_what(recwarn: pytest.WarningsRecorder) -> None:
    warn_of_overlap(rows(text(1), text(2)), rows(text(3), text(1), source="train"))
    (said,) = (str(each.message) for each in recwarn)
    assert "1 of 2 rows" in said
    assert "% of the text" in said
    assert "file, line 1 is in train, line 2" in said
    assert "leave these rows out of data.train or data.eval" in said
    warn_of_overlap([], rows(text(1)))
    warn_of_overlap(rows(text(2)), rows(text(1)))
    assert len(recwarn) == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_training_files(tmp_path_factory.mktemp("overlap"))


def test_a_run_says_it_before_it_starts(files: Files, tmp_path: Path) -> None:
    settings = files.settings(tmp_path / "run", data={"train": str(files.data), "eval": str(files.data)})
    with pytest.warns(UserWarning, match=r"12 of 12 rows, 100% of the text"):
        check(TrainSettings.read(None, settings))


def test_labels_of_one_expert_alone_are_said(files: Files, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "one.jsonl", [{"text": "1 + 2", "expert": "math"}, {"text": "def f(x)"}])
    settings = files.settings(tmp_path / "run", data=str(data), objectives={"supervised": 0.1})
    with pytest.warns(UserWarning, match=r"labels of 'math' alone[\s\S]*add labelled rows of the other experts"):
        check(TrainSettings.read(None, settings))
