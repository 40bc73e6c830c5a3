"""What the demo prints: the comparison, its verdict, and the text that the mixture wrote."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loramix.analysis.colours import expert_colours
from loramix.analysis.metrics import confidence_of
from loramix.analysis.show.terminal import coloured_tokens, led_by, visible
from loramix.demo.compare import MIXED, SWITCHING, XLORA, Comparison
from loramix.demo.written import WrittenText
from loramix.evaluation.scores import BASE, ORACLE, UNIFORM
from loramix.evaluation.table import scores_table


def comparison_table(result: Comparison) -> Table:
    """Rows are models, columns are texts; the best figure of a column (the oracle aside) is bold and starred."""
    names = {expert: _row_title(expert) for expert in result.bits_per_byte}
    return scores_table("Bits per byte of held-out text", result.bits_per_byte, names)


def verdict(result: Comparison) -> Text:
    """One sentence for each column that the router has to win, with its nearest rival."""
    lines: list[str] = []
    for column in (MIXED, SWITCHING):
        rival = min((BASE, *result.rivals), key=lambda row: result.bits_per_byte[row][column])
        own, other = result.bits_per_byte[XLORA][column], result.bits_per_byte[rival][column]
        word = "beats" if own < other else "DOES NOT BEAT"
        lines.append(f"{column + ':':10} X-LoRA ({own:.3f}) {word} the next best, {_row_title(rival)} ({other:.3f})")
    good = result.router_earns_its_place
    return Text("\n".join(lines), style="green" if good else "bold red")


def explanation(result: Comparison) -> Text:
    """An explanation of the rows and columns."""
    experts = len(result.rivals) - 1
    return Text(
        f"uniform mixture: every expert at 1/{experts}, for every token. oracle: it is told which domain the text is "
        "from and takes the best expert there; X-LoRA is not told. mixed: the text of all domains. "
        "switching: texts that change domain twice in mid-sequence.",
        style="dim",
    )


def written_panel(written: WrittenText, console: Console) -> Panel:
    """The prompt, dim, then the tokens that the mixture wrote, each in the colour of its leading expert."""
    text = Text().append(visible(written.prompt), style="dim")
    rows = [(token.text, token.leader, float(confidence_of(torch.tensor(token.weights)))) for token in written.tokens]
    text.append_text(coloured_tokens(rows, expert_colours(written.experts), console))
    order = [*written.experts, None]
    subtitle = led_by(sorted((token.leader for token in written.tokens), key=order.index))
    return Panel(text, title=written.title, subtitle=subtitle, title_align="left", subtitle_align="right")


def _row_title(row: str) -> str:
    return row if row in (BASE, UNIFORM, XLORA, ORACLE) else f"{row} expert"
