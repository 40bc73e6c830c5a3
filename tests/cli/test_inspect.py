"""`loramix inspect`: coloured text, JSON and HTML, and what is said where something is missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loramix import XLoraConfig, get_peft_model
from loramix.analysis.colours import PALETTE
from loramix.analysis.inspection import Inspection
from loramix.analysis.show.terminal import coloured_text, shown, visible
from support import tiny
from support.records import random_record, record_of


@pytest.fixture(scope="module")
def shared_mixture(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers share their scalings."""
    return saved(folders, tmp_path_factory.mktemp("shared"), folders.experts, layerwise_scalings=False)


@pytest.fixture(scope="module")
def lonely_mixture(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert."""
    return saved(folders, tmp_path_factory.mktemp("one"), {"math": folders.experts["math"]}, layerwise_scalings=True)


def saved(folders, folder: Path, experts: dict[str, Path], **options: bool) -> Path:
    from transformers import LlamaForCausalLM

    adapters = {name: str(path) for name, path in experts.items()}
    config = XLoraConfig(hidden_size=tiny.HIDDEN, adapters=adapters, xlora_depth=1, **options)
    get_peft_model(LlamaForCausalLM.from_pretrained(folders.base), config).save_pretrained(folder)
    return folder


def test_text_and_numbers_in_the_terminal(loramix, folders) -> None:
    done = loramix("inspect", folders.mixture, "--text", "def f(x):")
    assert (done.code, done.err) == (0, "")
    without_marks = done.out.replace("⟨math⟩", "").replace("⟨code⟩", "")
    for fact in ("def f(x):", "effective experts", "information", "MaxVio", "10 tokens, 2 experts, 6 layers."):
        assert fact in without_marks
    assert "loss without it" not in done.out


def test_as_json(loramix, folders) -> None:
    done = loramix("inspect", folders.mixture, "--text", "é<b>", "--leave-one-out", "--json")
    document = json.loads(done.out)
    assert document["experts"] == ["math", "code"]
    assert [token["token"] for token in document["tokens"]] == ["<s>", "", "é", "<", "b", ">"]
    assert [token["position"] for token in document["tokens"]] == list(range(6))
    for token in document["tokens"]:
        assert sum(token["weights"]) == pytest.approx(1, abs=1e-4)
        assert token["leader"] == document["experts"][token["weights"][1] > token["weights"][0]]
    assert set(document["leave_one_out"]["differences"]) == {"math", "code"}
    assert document["leave_one_out"]["tokens"] == 5
    assert set(document["metrics"]) >= {"information", "max_violation", "effective_experts"}


def test_as_html(loramix, folders, tmp_path: Path) -> None:
    done = loramix("inspect", folders.mixture, "--text", "<i>x", "--html", tmp_path / "out.html", "--leave-one-out")
    assert done.code == 0
    assert "out.html: 5 tokens" in done.out.replace("\n", "")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "helps" in page or "hurts" in page or "unclear" in page


def test_html_has_what_each_expert_is_worth_unless_it_is_not_to(loramix, folders, tmp_path: Path) -> None:
    for options, measured in (((), True), (("--no-leave-one-out",), False)):
        loramix("inspect", folders.mixture, "--text", "abc", "--html", tmp_path / "out.html", *options)
        page = (tmp_path / "out.html").read_text(encoding="utf-8")
        assert ("The loss on" in page, "Not measured" in page) == (measured, not measured)


def test_html_and_json_together(loramix, folders, tmp_path: Path) -> None:
    done = loramix("inspect", folders.mixture, "--text", "x", "--html", tmp_path / "out.html", "--json")
    assert json.loads(done.out)["experts"] == ["math", "code"]
    assert (tmp_path / "out.html").is_file()


def test_files_and_data_as_an_evaluation_takes_them(loramix, folders, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text", encoding="utf-8")
    document = json.loads(loramix("inspect", folders.mixture, "--file", tmp_path / "notes.txt", "--json").out)
    assert document["texts"] == ["notes.txt"]
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two", "expert": "code"}\n', encoding="utf-8")
    document = json.loads(loramix("inspect", folders.mixture, "--data", tmp_path / "rows.jsonl", "--json").out)
    assert [name.rpartition(", ")[2] for name in document["texts"]] == ["line 1", "line 2"]


def test_a_text_beyond_the_context_is_read_in_pieces_and_that_is_said(loramix, folders) -> None:
    positions = json.loads((folders.base / "config.json").read_text())["max_position_embeddings"]
    text = "abcdefghij" * (positions * 3 // 10)
    document = json.loads(loramix("inspect", folders.mixture, "--text", text, "--json").out)
    assert len(document["texts"]) == 3
    assert document["texts"][1] == f"text, tokens {positions - 1} to {2 * positions - 3}"
    assert [token["text"] for token in document["tokens"]].count(0) == positions
    assert f"longer than the {positions} tokens that the base model has positions for" in document["notes"][1]


def test_what_lies_beyond_the_limit_is_said(loramix, folders) -> None:
    document = json.loads(loramix("inspect", folders.mixture, "--text", "a" * 50, "--limit", "11", "--json").out)
    assert document["notes"][1] == "Read: the first 10 of 50 tokens; the rest is beyond the limit of 11."
    assert len(document["tokens"]) == 11


def test_shared_scalings_and_one_expert_are_said(loramix, shared_mixture: Path, lonely_mixture: Path) -> None:
    document = json.loads(loramix("inspect", shared_mixture, "--text", "x", "--json").out)
    assert document["shared_by_all_layers"]
    assert document["notes"][1] == "The 6 adapted layers share one routing: no layer differs."
    document = json.loads(loramix("inspect", lonely_mixture, "--text", "x", "--json", "--leave-one-out").out)
    assert document["notes"][1].startswith("One expert alone")
    assert document["leave_one_out"] is None


@pytest.mark.parametrize("words", [(), ("--text", "a", "--file", "b")])
def test_one_text_is_named(words: tuple[str, ...], loramix, folders) -> None:
    done = loramix("inspect", folders.mixture, *words)
    assert done.code == 2
    assert "--file" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--text", ""), "A text to look at has at least one token."),
        (("--file", "nowhere.txt"), "nowhere.txt: No such file or directory"),
        (("--file", "."), ".: Is a directory"),
        (("--text", "x", "--window", "100000"), "no more than the base model has positions"),
        (("--text", "x", "--html", "no/such/folder.html"), "into a folder that exists"),
    ],
)
def test_what_cannot_be_is_told(words: tuple[str, ...], said: str, loramix, folders) -> None:
    done = loramix("inspect", folders.mixture, *words)
    assert (done.code, done.out) == (1, "")
    assert said in done.err


def test_a_single_expert_is_no_mixture(loramix, folders) -> None:
    done = loramix("inspect", folders.experts["math"], "--text", "x", "--base", folders.base)
    assert done.code == 1
    assert "Only a mixture has a routing to look at." in done.err


def on_a_terminal(what: object, *, colour: bool) -> str:
    system = "truecolor" if colour else None
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=system, highlight=False)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_token_has_the_colour_of_its_leading_expert_and_is_bold_where_that_is_clear() -> None:
    scalings = torch.tensor([[[0.95, 0.05]], [[0.48, 0.52]], [[0.2, 0.8]]])
    inspection = Inspection(record_of(scalings))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    text = coloured_text(inspection, console, 10)
    assert [str(span.style) for span in text.spans[1:]] == ["bold #56b4e9", "dim #e69f00", "not dim #e69f00"]


def test_a_token_that_no_expert_leads_has_no_colour_and_no_name() -> None:
    record = record_of(torch.eye(3)[[0, 1, 0]][:, None]).select(experts=["e1", "e2"])
    plain = on_a_terminal(coloured_text(Inspection(record), Console(color_system=None), 600), colour=False)
    assert plain.endswith("#0⟨e1⟩#1⟨no expert⟩#2\n")
    coloured = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    spans = [str(span.style) for span in coloured_text(Inspection(record), coloured, 10).spans]
    assert spans == ["dim", f"bold {PALETTE[1]}"]


def test_a_long_text_is_cut_in_the_terminal_and_that_is_said() -> None:
    printed = on_a_terminal(shown(Inspection(random_record(1000)), Console(color_system=None)), colour=False)
    assert "… the first 600 of 1000 tokens" in printed
    assert "#599" in printed
    assert "#600" not in printed


def test_text_and_names_do_not_steer_the_terminal() -> None:
    record = random_record(3, experts=2)
    record.header.experts = record.header.palette = ["\x1b[2J", "[bold]b"]
    printed = on_a_terminal(shown(Inspection(record, names=["\x1b]0;t\x07"]), Console(color_system=None)), colour=False)
    assert "\x1b" not in printed
    assert "[bold]b" in printed
    assert visible("a\x1b[31m\x9b\x7f\n\t") == "a␛[31m�␡\n\t"
    assert visible("\u202eabc\u2066\u200b\u2028") == "�abc���"
    assert visible("\U0001f469\u200d\U0001f4bb שלום") == "\U0001f469\u200d\U0001f4bb שלום"
