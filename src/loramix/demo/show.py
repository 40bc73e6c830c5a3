"""How the demo looks in a terminal: the table and the coloured text.

Where there is no colour (a pipe, NO_COLOR), text says by marks what colour says elsewhere.
"""

from __future__ import annotations

import itertools

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loramix.analysis.show.colours import expert_colours
from loramix.analysis.show.terminal import has_colour
from loramix.demo.compare import COLUMNS, MIXED, SWITCHING, XLORA, Comparison
from loramix.demo.routed import RoutedText
from loramix.evaluation.scores import BASE, ORACLE, UNIFORM


def comparison_table(result: Comparison) -> Table:
    """Rows are models, columns are texts; the best figure of a column (the oracle aside) is bold and starred."""
    table = Table(title="Bits per byte of held-out text: lower is better, * is best", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    rows = {row: figures for row, figures in result.bits_per_byte.items() if row != ORACLE}
    best = {column: min(figures[column] for figures in rows.values()) for column in COLUMNS}
    for row, figures in result.bits_per_byte.items():
        if row in (UNIFORM, ORACLE):
            table.add_section()
        cells = [_figure(figures[column], row != ORACLE and figures[column] == best[column]) for column in COLUMNS]
        table.add_row(Text(_row_title(row), style="bold" if row == XLORA else ""), *cells)
    return table


def verdict(result: Comparison) -> Text:
    """One sentence for each text that the router must win, with its nearest rival."""
    lines: list[str] = []
    for column in (MIXED, SWITCHING):
        rival = min((BASE, *result.rivals), key=lambda row: result.bits_per_byte[row][column])
        own, other = result.bits_per_byte[XLORA][column], result.bits_per_byte[rival][column]
        word = "beats" if own < other else "DOES NOT BEAT"
        lines.append(f"{column + ':':10} X-LoRA ({own:.3f}) {word} the next best, {_row_title(rival)} ({other:.3f})")
    good = result.router_earns_its_place
    return Text("\n".join(lines), style="green" if good else "bold red")


def explanation(result: Comparison) -> Text:
    """What the rows and columns are."""
    experts = len(result.rivals) - 1
    return Text(
        f"uniform mixture: every expert at 1/{experts}, for every token. oracle: it is told which domain the text is "
        "from and takes the best expert there; X-LoRA is not told. mixed: the text of all domains. "
        "switching: texts that change domain twice in mid-sequence.",
        style="dim",
    )


def routed_panel(routed: RoutedText, console: Console) -> Panel:
    """The prompt, dim, then what the mixture wrote, each token in the colour of its leading expert."""
    text = Text("".join(routed.tokens[: routed.prompt]), style="dim")
    written = list(zip(routed.tokens, routed.leaders, strict=True))[routed.prompt :]
    paint = expert_colours(routed.experts)
    if has_colour(console):
        for token, leader in written:
            text.append(token, style=f"not dim {paint[leader]}")
    else:
        for leader, run in itertools.groupby(written, key=lambda pair: pair[1]):
            text.append(f"⟨{leader}⟩" + "".join(token for token, _ in run))
    shares = sorted(routed.shares.items(), key=lambda item: -item[1])
    subtitle = ", ".join(f"{name} {share:.0%}" for name, share in shares if share)
    return Panel(text, title=routed.title, subtitle=f"led by {subtitle}", title_align="left", subtitle_align="right")


def _row_title(row: str) -> str:
    return row if row in (BASE, UNIFORM, XLORA, ORACLE) else f"{row} expert"


def _figure(value: float, best: bool) -> Text:
    return Text(f"{value:.3f}{'*' if best else ' '}", style="bold" if best else "")
