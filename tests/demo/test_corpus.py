"""The demo's text: deterministic, split by where it comes from, nothing held out that was trained on."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from loramix.demo import corpus, sources
from loramix.demo.arithmetic import worked_problems
from loramix.demo.split import SHARED_WORDS, is_held_out, module_key, stable_hash, without_runs, word_runs
from loramix.errors import LoramixError

SAMPLE = 120_000


@cache
def train_documents(domain: str) -> list[tuple[str, str]]:
    return list(corpus.train_documents(domain))


@cache
def heldout_documents(domain: str) -> list[tuple[str, str]]:
    return list(corpus.heldout_documents(domain))


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_a_document_is_on_one_side(domain: str) -> None:
    train = [name for name, _ in train_documents(domain)]
    held_out = [name for name, _ in heldout_documents(domain)]
    assert len(train) > 4 * len(held_out) > 40
    assert len({*train, *held_out}) == len(train) + len(held_out)


@pytest.mark.parametrize("domain", ["code", "prose"])
def test_no_run_of_words_is_on_both_sides(domain: str) -> None:
    """In whole documents, whatever their paragraphs, and whichever domain the text is held out in."""
    held_out = {run for other in ("code", "prose") for _, text in heldout_documents(other) for run in word_runs(text)}
    assert len(held_out) > 10_000
    for _, text in train_documents(domain):
        assert held_out.isdisjoint(word_runs(text))


def test_paragraphs_that_a_run_touches_are_left_out_until_none_is_left() -> None:
    words = [f"w{i}" for i in range(40)]
    runs = set(word_runs(" ".join(words)))
    text = f"before\n\n{' '.join(words[:7])}\n\n{' '.join(words[7:14])}\n\nafter\n"
    assert without_runs(text, runs) == "before\n\nafter\n"
    assert without_runs("nothing of it\n", runs) == "nothing of it\n"
    assert without_runs(" ".join(words), runs) == ""
    between = f"{' '.join(words[:6])}\n\n{' '.join(words[20:34])}\n\n{' '.join(words[6:12])}\n"
    assert without_runs(between, runs) == ""


def test_repeats_are_what_the_split_removes() -> None:
    """The rule has work to do: whole documents do repeat held-out text."""
    held_out = set(itertools.chain.from_iterable(map(word_runs, (text for _, text in heldout_documents("prose")))))
    raw = [
        source.read() for source in sources.prose() if not is_held_out(source.key) and source.name.startswith("topic")
    ]
    assert any(held_out & set(word_runs(text)) for text in raw)


def test_no_problem_is_on_both_sides() -> None:
    """Names and things aside, a held-out answer line (operands and result) never occurs in training text."""
    answers = re.compile(r"Answer: ([\d+*/ -]+=.*\d)")
    held_out = {m for text in corpus.heldout_text("math", SAMPLE) for m in answers.findall(text)}
    train = {m for text in corpus.train_text("math", SAMPLE) for m in answers.findall(text)}
    assert held_out
    assert held_out.isdisjoint(train)


@pytest.mark.parametrize("seed", range(40))
def test_the_arithmetic_is_right(seed: int) -> None:
    text = worked_problems(seed)
    equations = re.findall(r"(\d[\d.]*(?: [-+*/] \d[\d.]*)+) = (\d+(?:\.\d+)?)(, (?:\d+|nothing) left over)?", text)
    assert equations
    for left, right, rest in equations:
        assert math.floor(eval(left)) == int(right) if rest else eval(left) == pytest.approx(float(right))


def test_versions_of_a_module_share_a_key() -> None:
    names = ["datetime.py", "_pydatetime.py", "_datetime", "datetime"]
    assert {module_key(name) for name in names} == {"datetime"}
    assert module_key("_py_warnings.py") == module_key("warnings.py")


def test_the_split_is_the_same_everywhere() -> None:
    """The numbers of a fixed hash, not of this run's `hash`."""
    assert stable_hash("datetime") == 2838342210467241124
    assert is_held_out("zipfile")


@cache
def digest() -> str:
    texts = [*corpus.train_text("prose", 60_000), str(corpus.switching_pieces(4, held_out=True, seed=3))]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_text_is_the_same_in_another_process(seed: str) -> None:
    """Although the split compares runs of words by Python's `hash`, which differs from process to process."""
    code = (
        "import hashlib; from loramix.demo import corpus\n"
        "texts = corpus.train_text('prose', 60_000) + [str(corpus.switching_pieces(4, held_out=True, seed=3))]\n"
        "print(hashlib.sha256(''.join(texts).encode()).hexdigest())"
    )
    environment = {"PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    assert done.stdout.strip() == digest()


def test_switching_text_has_different_domains_from_one_side_only() -> None:
    documents = {domain: "".join(corpus.heldout_text(domain, 160_000)) for domain in corpus.DOMAINS}
    for pieces in corpus.switching_pieces(6, held_out=True, seed=1):
        assert len({domain for domain, _ in pieces}) == 3
        assert all(text.removesuffix("\n") in documents[domain] for domain, text in pieces)


def test_mixed_text_has_every_domain() -> None:
    texts = corpus.mixed_heldout(2000)
    assert all(any(text in own for text in texts) for own in (corpus.heldout_text(d, 2000) for d in corpus.DOMAINS))


def test_a_run_of_words_ignores_line_breaks() -> None:
    words = [f"w{i}" for i in range(SHARED_WORDS + 2)]
    assert word_runs(" ".join(words)) == word_runs("\n    ".join(words))
    assert len(word_runs(" ".join(words))) == 3
    shuffled = random.Random(0).sample(words, len(words))
    assert set(word_runs(" ".join(words))).isdisjoint(word_runs(" ".join(shuffled)))


def test_a_python_without_sources_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(LoramixError, match="standard library"):
        sources._standard_library()


def test_a_python_without_topics_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(LoramixError, match="pydoc_data"):
        sources.prose()
