"""What the demo prints: the same with and without colour."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from loramix.analysis import WrittenToken, expert_colours
from loramix.analysis.show.terminal import legend
from loramix.demo.compare import COLUMNS, MIXED, SWITCHING, XLORA, Comparison
from loramix.demo.picture import draw
from loramix.demo.show import comparison_table, explanation, verdict, written_panel
from loramix.demo.written import WrittenText
from loramix.evaluation.scores import BASE, ORACLE, UNIFORM
from support.records import random_record

EXPERTS = ["code", "math"]
WRITTEN = WrittenText(
    title="math",
    prompt="Sum:",
    tokens=[
        WrittenToken(" 1", "math", [0.1, 0.9]),
        WrittenToken("2", "math", [0.2, 0.8]),
        WrittenToken(" if", "code", [0.7, 0.3]),
        WrittenToken(" x", "code", [0.6, 0.4]),
    ],
    experts=EXPERTS,
)


def comparison(xlora: float) -> Comparison:
    figures = {BASE: 2.0, "code": 1.8, "math": 1.9, UNIFORM: 1.6, XLORA: xlora, ORACLE: 1.4}
    rows = {row: dict.fromkeys(COLUMNS, figure) for row, figure in figures.items()}
    return Comparison(rows, {"code": "code", "math": "math"}, dict.fromkeys(COLUMNS, 100))


def console(*, colour: bool) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=colour, color_system="truecolor" if colour else None)


def printed(what: RenderableType) -> str:
    out = console(colour=False)
    out.print(what)
    return written(out)


def panel(*, colour: bool) -> str:
    out = console(colour=colour)
    out.print(written_panel(WRITTEN, out))
    return written(out)


def written(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_the_shares_of_the_leaders_are_told_equal_ones_in_the_order_of_the_experts() -> None:
    assert "led by code 50%, math 50%" in panel(colour=False)


def test_without_colour_marks_say_who_leads() -> None:
    assert "Sum:⟨math⟩ 12⟨code⟩ if x" in panel(colour=False)
    assert "\x1b[" not in panel(colour=False)


def test_with_colour_each_token_has_its_leaders_colour() -> None:
    text = panel(colour=True)
    assert "⟨" not in text
    for expert in EXPERTS:
        red, green, blue = (int(expert_colours(EXPERTS)[expert][i : i + 2], 16) for i in (1, 3, 5))
        assert f"38;2;{red};{green};{blue}m" in text


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Console(file=io.StringIO(), force_terminal=True)
    out.print(written_panel(WRITTEN, out))
    assert "⟨math⟩" in written(out)


@pytest.mark.parametrize("colour", [True, False])
def test_the_legend_names_every_expert(colour: bool) -> None:
    text = legend(EXPERTS, console(colour=colour)).plain
    assert all(expert in text for expert in EXPERTS)
    assert ("⟨" in text) is not colour


def test_the_explanation_counts_the_experts() -> None:
    assert "1/2" in explanation(comparison(1.5)).plain


def test_the_table_stars_the_best_of_a_column_and_leaves_the_oracle_out() -> None:
    lines = printed(comparison_table(comparison(1.5))).splitlines()
    assert all("1.500*" in line for line in lines if XLORA in line)
    assert not any("*" in line for line in lines if "oracle" in line)
    assert sum("oracle" in line for line in lines) == 1


@pytest.mark.parametrize(("xlora", "earned"), [(1.5, True), (1.6, False), (1.7, False)])
def test_the_verdict_is_measured(xlora: float, earned: bool) -> None:
    result = comparison(xlora)
    assert result.router_earns_its_place is earned
    assert ("DOES NOT BEAT" not in printed(verdict(result))) is earned


def test_both_texts_must_be_won() -> None:
    result = comparison(1.5)
    for column in (MIXED, SWITCHING):
        lost = {row: dict(figures) for row, figures in result.bits_per_byte.items()}
        lost[XLORA][column] = 1.7
        assert not Comparison(lost, result.best_expert, result.bytes).router_earns_its_place


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw(random_record(6, experts=2), ["math"] * 4 + ["code"] * 2, tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
