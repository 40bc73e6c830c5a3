"""An inspection in a terminal: the text in the colours of the leading experts, the legend, and the metrics.

Without colours (a pipe, NO_COLOR) the experts' names are printed where they take the lead.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from loramix.analysis.colours import expert_colours
from loramix.analysis.inspection import Inspection
from loramix.analysis.metrics import RoutingMetrics, confidence_of, leaders_of
from loramix.evaluation.ablation import LeaveOneOut

TOKENS = 600  # shown of a long text
NO_LEADER = "no expert"  # where no expert has a weight
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_UNSEEN = [0x61C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
_CONTROL = _PICTURES | {0x7F: "␡"} | dict.fromkeys([*range(0x80, 0xA0), *_UNSEEN], "�")


def shown(inspection: Inspection, console: Console) -> RenderableType:
    """All of an inspection: text, legend, experts, metrics, notes."""
    parts: list[RenderableType] = [coloured_text(inspection, console, TOKENS)]
    if inspection.record.kept > TOKENS:
        left = f"… the first {TOKENS} of {inspection.record.kept} tokens; --html shows more of them, --json all."
        parts.append(Text(left, style="dim"))
    parts += [legend(inspection.record.experts, console, inspection.record.palette), Text("")]
    parts += [experts_table(inspection), metrics_table(inspection.record.metrics())]
    parts += [Text(visible(note), style="dim") for note in inspection.all_notes]
    return Group(*parts)


def coloured_text(inspection: Inspection, console: Console, most: int) -> Text:
    """The first tokens in the colours of the leading experts: bold where one leads clearly, dim where hardly."""
    record = inspection.record
    whole = record.select(tokens=torch.arange(record.kept) < most) if record.kept > most else record
    weights, numbers = whole.weights, whole.sequence_numbers.tolist()
    leaders, sure = leaders_of(whole.experts, weights), confidence_of(weights).tolist()
    rows = list(zip(numbers, whole.pieces(), leaders, sure, strict=True))
    paint, text = expert_colours(record.palette), Text()
    for number, run in itertools.groupby(rows, key=itemgetter(0)):
        if text:
            text.append("\n")
        text.append(f"── {visible(inspection.name_of(number))}\n", style="dim")
        text.append_text(coloured_tokens((row[1:] for row in run), paint, console))
    return text


def coloured_tokens(rows: Iterable[tuple[str, str | None, float]], paint: Mapping[str, str], console: Console) -> Text:
    """Tokens of one text, each in the colour of its leading expert.

    Args:
        rows: text, leading expert and confidence of each token.
        paint: the colours of the experts.
        console: where the text is printed.
    """
    text, before = Text(), None
    for piece, leader, confidence in rows:
        if piece:  # a character of several tokens is in the last one's piece
            text.append_text(token_text(piece, leader, confidence, paint, console, named=leader != before))
            before = leader
    return text


def led_by(leaders: Iterable[str | None]) -> str:
    """The share of the tokens that each expert leads, the largest first: "led by math 75%, code 25%".

    Equal shares stay in the order in which their experts occur.
    """
    count = Counter(leader or NO_LEADER for leader in leaders)
    shares = ", ".join(f"{visible(name)} {many / count.total():.0%}" for name, many in count.most_common())
    return f"led by {shares}"


def token_text(
    piece: str, leader: str | None, confidence: float, paint: Mapping[str, str], console: Console, *, named: bool
) -> Text:
    """A token in its leading expert's colour, without one where no expert leads.

    On a console without colours the expert's name precedes it, if `named`.
    """
    if has_colour(console):
        return Text(visible(piece), style="" if leader is None else f"{_strength(confidence)} {paint[leader]}")
    return Text((f"⟨{visible(leader or NO_LEADER)}⟩" if named else "") + visible(piece))


def _strength(confidence: float) -> str:
    return "bold" if confidence > 2 / 3 else "dim" if confidence < 1 / 6 else "not dim"


def legend(experts: Sequence[str], console: Console, palette: Sequence[str] | None = None) -> Text:
    """The experts in their colours; without colours, how the text is marked."""
    if not has_colour(console):
        return Text("⟨name⟩ stands where another expert takes the lead: " + ", ".join(map(visible, experts)))
    paint = expert_colours(palette or experts)
    return Text("  ").join(Text(f"■ {visible(name)}", style=paint[name]) for name in experts)


def experts_table(inspection: Inspection) -> Table:
    """A row for each expert: load, importance, and the change in loss without it."""
    metrics = inspection.record.metrics()
    losses = inspection.leave_one_out if inspection.differences else None
    table = Table(title="Experts", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("leads", "mean scaling", *([] if losses is None else ["loss without it"])):
        table.add_column(column, justify="right", no_wrap=True)
    for name, load, importance in zip(inspection.record.experts, metrics.load, metrics.importance, strict=True):
        cells = [f"{load:.1%}", f"{importance:.3f}"]
        if losses is not None:
            cells.append(" ".join(leave_one_out_texts(losses, name)))
        table.add_row(Text(visible(name)), *cells)
    return table


def leave_one_out_texts(losses: LeaveOneOut, expert: str) -> tuple[str, str]:
    """The change in loss without an expert, with two standard errors, and the verdict on the expert."""
    error = losses.errors.get(expert)
    spread = "" if error is None else f" ± {2 * error:.4f}"
    return f"{losses.differences[expert]:+.4f}{spread}", losses.verdict(expert)


def metrics_table(metrics: RoutingMetrics) -> Table:
    """The metrics that do not depend on the expert, with their meanings."""
    table = Table(title=f"{metrics.tokens} tokens", title_justify="left")
    for column in ("", "value", "meaning"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value, meaning in metrics.rows():
        table.add_row(name, value, Text(meaning, style="dim"))
    return table


def visible(text: str) -> str:
    """A text in which marks replace control characters and characters that change the direction of writing."""
    return text.translate(_CONTROL)


def has_colour(console: Console) -> bool:
    """Whether a console shows colours."""
    return console.color_system is not None and not console.no_color
