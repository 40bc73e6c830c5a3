"""The report as a file: one file without an address, data that cannot become code, and what it says is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import loramix
from loramix.analysis.colours import PALETTE
from loramix.analysis.inspection import Inspection
from loramix.analysis.metrics import confidence_of, entropy_of
from loramix.analysis.report.data import choose_tokens, embedded
from loramix.analysis.report.parts import CONTRAST, DARK, LIGHT, contrast, strongest
from loramix.analysis.report.report import check_place, report_html, write_report
from loramix.errors import ConfigurationError, RoutingError, SaveError
from loramix.evaluation.ablation import LeaveOneOut
from support.records import random_record, record_of

DOCS = Path(__file__).parents[2] / "docs"
SOURCE = Path(loramix.__file__).parent / "analysis" / "report"
EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \" ' & \u2028 ]]>"
ADDRESS = re.compile(r"https?:|//\w|\burl\(|\bsrc=|\bhref=|@import|\bimport\s*\(|fetch\(|XMLHttpRequest", re.IGNORECASE)


class _Words:
    """A tokenizer whose token i is a text of its own."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.words[i] for i in ids)


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def decoded(text: str) -> bytes:
    return base64.b64decode(text)


def test_the_page_asks_for_nothing_from_anywhere() -> None:
    page = report_html(random_record())
    without_data = re.sub(r'(id="data">).*?(</script>)', r"\1\2", page, flags=re.DOTALL)
    assert ADDRESS.findall(without_data) == []
    assert {"link", "img", "iframe", "object", "embed", "base", "form"}.isdisjoint(_Elements(page).names)


def test_the_policy_allows_the_one_script_and_the_one_style_of_the_page() -> None:
    page = report_html(random_record())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'")
    for kind, tag in (("script-src", "<script>"), ("style-src", "<style>")):
        content = page.split(tag)[-1].split(f"</{tag[1:]}")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "style" not in _Elements(page).attributes
    assert not [name for name in _Elements(page).attributes if name.startswith("on")]


def test_text_and_names_cannot_break_out() -> None:
    harmless = random_record(count=3, experts=2)
    plain = report_html(Inspection(harmless, notes=["cut"], leave_one_out=LeaveOneOut(1.0, {"e0": 1.0, "e1": 2.0}, 3)))
    names = [EVIL, "b<i>"]
    record = record_of(
        harmless.scalings, experts=names, tokenizer=_Words([EVIL, "{{data}}", "<!--<script>"]), tokens=[0, 1, 2]
    )
    losses = LeaveOneOut(1.0, dict.fromkeys(names, 2.0), 3)
    page = report_html(Inspection(record, title=EVIL, names=[EVIL], notes=[EVIL], leave_one_out=losses))
    assert _Elements(page).names == _Elements(plain).names
    assert page.count("<script") == plain.count("<script") == 2
    assert page.count("<!--") == 0
    assert data_of(page)["pieces"] == [EVIL, "{{data}}", "<!--<script>"]
    assert data_of(page)["experts"] == names
    assert "img" not in _Elements(page).names


def test_what_is_embedded_holds_no_markup_and_is_the_same_again() -> None:
    value = {"a": EVIL, "half": "\ud800"}
    text = embedded(value)
    assert set("<>&\u2028\u2029").isdisjoint(text)
    assert json.loads(text) == {"a": EVIL, "half": "?"}


def test_weights_come_back_to_within_half_a_step() -> None:
    record = random_record(count=9, layers=4, experts=3, seed=1)
    data = data_of(report_html(record))
    step = (data["high"] - data["low"]) / 255
    for name, expected in (("weights", record.weights), ("layerWeights", record.scalings)):
        found = torch.tensor(list(decoded(data[name]))).double().reshape(expected.shape) * step + data["low"]
        assert torch.allclose(found, expected.double(), atol=step / 2 + 1e-6)
    leading = torch.frombuffer(bytearray(decoded(data["leading"])), dtype=torch.int16)
    assert leading.tolist() == record.leading.tolist()
    for name, expected in (
        ("confidence", confidence_of(record.weights)),
        ("entropy", entropy_of(record.scalings).mean(1)),
    ):
        words = torch.frombuffer(bytearray(decoded(data[name])), dtype=torch.uint16).double() / 65535
        assert torch.allclose(words, expected.double(), atol=1e-5)


def test_negative_scalings_and_those_above_one_are_within_the_range() -> None:
    data = data_of(report_html(record_of(torch.tensor([[[-3.0, 5.0]], [[0.0, 2.0]]]))))
    assert (data["low"], data["high"]) == (-3.0, 5.0)


def test_shared_scalings_have_no_layer_view_and_say_so() -> None:
    page = report_html(random_record(layers=1, shared=True))
    data = data_of(page)
    assert (data["shared"], data["layers"], decoded(data["layerTokens"])) == (True, [], b"")
    assert "share one routing: no layer differs" in page


def test_one_expert_is_said_to_be_alone() -> None:
    page = report_html(record_of(torch.ones(3, 2, 1)))
    assert "One expert alone" in page
    assert "there is none to leave out" in page


def test_the_losses_without_each_expert_are_shown_where_they_were_measured() -> None:
    record = random_record(experts=2)
    assert "Not measured" in report_html(record)
    page = report_html(Inspection(record, leave_one_out=LeaveOneOut(1.5, {"e0": 1.4, "e1": 1.75}, 11)))
    assert "-0.1000</td><td>hurts" in page
    assert "+0.2500</td><td>helps" in page
    assert "standard errors" not in page
    spread = LeaveOneOut(1.5, {"e0": 1.4, "e1": 1.75}, 11, {"e0": 0.06, "e1": 0.06})
    page = report_html(Inspection(record, leave_one_out=spread))
    assert "-0.1000 ± 0.1200</td><td>unclear" in page
    assert "+0.2500 ± 0.1200</td><td>helps" in page
    assert "two standard errors" in page
    assert Inspection(record, leave_one_out=spread).to_dict()["leave_one_out"]["standard_errors"] == {
        "e0": 0.06,
        "e1": 0.06,
    }


def test_a_selection_is_not_taken_for_a_mixture_of_one() -> None:
    some = Inspection(random_record(12, texts=[5, 7]).select(experts=["e0"], sequences=[1]), "some", ["A", "B"])
    assert "One expert alone" not in " ".join(some.all_notes)
    assert "none to leave out" not in report_html(some)
    told = some.to_dict()
    assert [told["texts"][token["text"]] for token in told["tokens"]] == ["B"] * 7


def test_no_expert_leads_where_no_selected_expert_has_a_weight() -> None:
    record = record_of(torch.eye(3)[[0, 1, 0]][:, None].expand(3, 2, 3)).select(experts=["e1", "e2"])
    found = Inspection(record)
    page = report_html(found)
    data = data_of(page)
    for name, expected in (("leading", [-1, 0, -1]), ("layerLeading", [-1, -1, 0, 0, -1, -1])):
        assert torch.frombuffer(bytearray(decoded(data[name])), dtype=torch.int16).tolist() == expected
    assert re.findall(r'<path class="fill (e\d) s\d" d="M(\d)', page) == [("e1", "1")]
    assert [token["leader"] for token in found.to_dict()["tokens"]] == [None, "e1", None]
    assert re.findall(r"<span title=[^>]*style=[^>]*>(#\d)", record._repr_html_()) == ["#1"]
    assert re.findall(r'<span title="e1 0.00, e2 0.00">(#\d)', record._repr_html_()) == ["#0", "#2"]


def test_texts_that_fork_say_from_where() -> None:
    record = record_of(torch.ones(9, 1, 2), texts=[5, 4])
    record.header.forks[1] = (0, 3)
    assert data_of(report_html(Inspection(record, names=["first", "second"])))["forks"] == {"1": ["first", 3]}


def test_the_strip_is_paler_where_the_lead_is_less() -> None:
    page = report_html(record_of(torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]], [[0.0, 1.0]]])))
    found = re.findall(r'<path class="fill (e\d) (s\d)" d="M(\d)', page)
    assert found == [("e0", "s0", "0"), ("e0", "s7", "1"), ("e1", "s7", "2")]


def test_losses_of_another_mixture_are_refused() -> None:
    with pytest.raises(RoutingError, match="with the mixture of the record"):
        Inspection(random_record(experts=2), leave_one_out=LeaveOneOut(1.5, {"e0": 1.4, "other": 1.75}, 11))
    some = Inspection(
        random_record(experts=3).select(experts=["e2"]),
        leave_one_out=LeaveOneOut(1.5, {"e0": 1.4, "e1": 1.75, "e2": 1.5}, 11),
    )
    assert some.differences == {"e2": 0.0}
    alone = Inspection(record_of(torch.ones(3, 2, 1)), leave_one_out=LeaveOneOut(1.5, {}, 2))
    assert alone.differences == {}
    assert "there is none to leave out" in report_html(alone)


def test_a_long_record_is_sampled_in_runs_and_says_so() -> None:
    record = random_record(count=3000, layers=2, experts=2)
    page = report_html(record, tokens=512)
    data = data_of(page)
    assert "The report shows 440 of 3000 tokens" in page  # the last run is the record's rest
    assert data["runs"][0] == [0, 0, 0, 0]
    assert len(data["pieces"]) == sum(len(record.pieces()[run[3] : run[3] + 256]) for run in data["runs"])
    last = data["runs"][-1]
    assert len(data["runs"]) == 2
    assert record.leading[last[3]] == torch.frombuffer(bytearray(decoded(data["leading"])), dtype=torch.int16)[last[0]]


def test_fewer_tokens_than_a_run_are_as_many_as_asked_for() -> None:
    record = random_record(count=300, layers=2, experts=2)
    assert choose_tokens(record, 10).rows.tolist() == list(range(10))
    assert choose_tokens(record, 1).notes[0].startswith("The report shows 1 of 300 tokens, runs of 1 ")
    for wrong in (0, -1, True):
        with pytest.raises(ConfigurationError, match="tokens must be"):
            report_html(record, tokens=wrong)


def test_negative_scalings_are_said() -> None:
    record = record_of(-torch.rand(10, 4, 3) - 0.1)
    assert "Some scalings are negative" in report_html(record)
    assert "Some scalings are negative" not in report_html(random_record())


def test_names_with_half_a_surrogate_are_shown_without_it(tmp_path: Path) -> None:
    record = random_record(experts=2)
    record.header.experts = record.header.palette = ["a\ud800", "b"]
    assert write_report(Inspection(record, "title\ud800", ["text\ud800"]), tmp_path / "out.html")
    assert "title?" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_layers_are_sampled_where_there_are_many() -> None:
    record = random_record(count=100, layers=4, experts=3)
    shown = choose_tokens(record, layer_bytes=4 * 3 * 10)
    assert shown.with_layers.tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert shown.notes == ["Layers can be looked at in 10 of the tokens shown, at even distances."]
    assert choose_tokens(record).notes == []


def test_a_hundred_thousand_tokens_stay_a_file_that_can_be_sent() -> None:
    page = report_html(random_record(count=100_000, layers=2, experts=4))
    assert len(page) < 12_000_000


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("colour", PALETTE)
def test_text_keeps_its_contrast_on_every_colour(colour: str, theme: tuple[str, str]) -> None:
    paper, ink = theme
    share = strongest(colour, paper, ink)
    mixed = [
        share * int(colour[i : i + 2], 16) / 255 + (1 - share) * int(paper[i : i + 2], 16) / 255 for i in (1, 3, 5)
    ]
    assert contrast(tuple(mixed), tuple(int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5))) >= CONTRAST
    assert share >= 0.15


def test_the_report_among_the_documents_is_a_page_of_this_version() -> None:
    page = (DOCS / "routing_report.html").read_text(encoding="utf-8")
    for part in ("report.css", "report.js"):
        assert (SOURCE / part).read_text(encoding="utf-8") in page, "run `make docs`"
    assert len(page) < 500_000
    assert (DOCS / "routing_report.png").is_file()


def test_an_empty_record_is_an_error() -> None:
    with pytest.raises(RoutingError, match="need recorded tokens"):
        report_html(record_of(torch.zeros(0, 2, 2)))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="a folder that exists"):
        write_report(random_record(), tmp_path / "missing" / "out.html")
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(SaveError, match="a folder that exists"):
            write_report(random_record(), tmp_path / name)
    with pytest.raises(SaveError):
        check_place(tmp_path)
    with pytest.raises(SaveError):
        check_place(tmp_path / "missing" / "out.html")
    assert write_report(random_record(), tmp_path / "out.html") == ["12 tokens, 3 experts, 4 layers."]
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_notebook_gets_static_html_with_everything_escaped() -> None:
    record = record_of(random_record(count=2, experts=2).scalings, experts=[EVIL, "b"], tokenizer=_Words([EVIL, "\n"]))
    page = record._repr_html_()
    assert set(_Elements(page).names) == {"div", "p", "span"}
    assert set(_Elements(page).attributes) <= {"style", "title"}
    assert ADDRESS.findall(page.replace("&lt;img src=x", "")) == []
    assert "Nothing was recorded" in record_of(torch.zeros(0, 2, 2))._repr_html_()
    assert len(random_record(count=5000)._repr_html_()) < 100_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scalings_that_are_no_numbers_are_refused(value: float) -> None:
    scalings = torch.softmax(torch.randn(4, 2, 3), -1)
    scalings[1, 0, 2] = value
    with pytest.raises(RoutingError, match="finite numbers"):
        report_html(record_of(scalings))
