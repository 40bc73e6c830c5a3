"""Parts that the pictures share: figures without pyplot, columns of tokens, readable labels.

E: experts. C: columns, each a token or a run of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.analysis.colours import expert_colours
from loramix.analysis.metrics import confidence_of, leaders_of
from loramix.analysis.record.header import without_shared_part
from loramix.analysis.record.record import RoutingRecord
from loramix.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

LONGEST = 22  # characters of a name; longer ones are cut in the middle
MARKS = {"\n": "↵", "\t": "⇥", "\r": "↵", " ": "·", "": "…"}
MISSING = "□"
NO_LEADER = (1.0, 1.0, 1.0)  # the colour where no expert leads
MOST_GAPS = 12
NAMED = 16  # experts in a legend


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, which pyplot does not know.

    Raises:
        UnsupportedOperationError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedOperationError(
            "A picture needs matplotlib.",
            received="an installation without it",
            remedy="pip install 'loramix[plot]'",
        ) from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class Columns:
    """The columns of a picture: tokens, or runs of tokens by their means.

    Attributes:
        values: the weights by expert and column.
        labels: the text of the tokens; None for runs.
        positions: the position of the first token of each column.
        each: the number of tokens in a run.
        gaps: where tokens are missing, in columns from the left edge; fractional within a run. Empty where there are
            more than `MOST_GAPS`, as in a sample.
    """

    values: Float[Tensor, "E C"]
    labels: list[str] | None
    positions: list[int]
    each: int
    gaps: list[float]

    def mean(self, numbers: Float[Tensor, " N"]) -> Float[Tensor, " C"]:
        """The mean of the tokens' numbers in each column."""
        return _in_runs(numbers[:, None], self.each)[:, 0]


def columns_of(text: RoutingRecord, across: int, most: int = 1) -> list[Columns]:
    """A text in lines of at most `across` columns: tokens if they fit into `most` lines, else one line of runs."""
    weights, positions = text.weights, text.positions.tolist()
    gaps = text.part.run_starts()[1:]
    gaps = gaps if len(gaps) <= MOST_GAPS else []
    if len(weights) > across * most or across > 100:
        each = -(-len(weights) // across)
        runs = [min(each, len(weights) - each * (gap // each)) for gap in gaps]  # the last one may be short
        missing = [gap // each + gap % each / run for gap, run in zip(gaps, runs, strict=True)]
        return [Columns(_in_runs(weights, each).T, None, positions[::each], each, missing)]
    pieces = [drawable(piece) for piece in text.pieces()]
    return [
        Columns(
            weights[i : i + across].T,
            pieces[i : i + across],
            positions[i : i + across],
            1,
            [gap - i for gap in gaps if i <= gap < i + across],
        )
        for i in range(0, len(weights), across)
    ]


def _in_runs(rows: Tensor, each: int) -> Tensor:
    return rows if each == 1 else torch.stack([run.mean(0) for run in rows.split(each)])


def leading_strip(axes: Axes, record: RoutingRecord, columns: Columns, across: int) -> None:
    """A row in the colours of the leading experts, paler where they lead less clearly."""
    paint, shares = expert_colours(record.palette), columns.values.T
    rows = zip(leaders_of(record.experts, shares), confidence_of(shares).tolist(), strict=True)
    colours = [NO_LEADER if leader is None else paled(paint[leader], strength) for leader, strength in rows]
    axes.imshow([colours], aspect="auto", interpolation="nearest")
    mark_gaps(axes, columns)
    axes.set_xlim(-0.5, max(across if columns.each == 1 else 0, len(colours)) - 0.5)
    axes.set_yticks([])
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def paled(colour: str, confidence: float) -> tuple[float, ...]:
    """A colour mixed with white: pure at confidence 1, a sixth of it at 0."""
    from matplotlib.colors import to_rgb

    share = (1 + 5 * confidence**0.5) / 6  # of many experts, none leads by much
    return tuple(share * part + 1 - share for part in to_rgb(colour))


def mark_gaps(axes: Axes, columns: Columns) -> None:
    """A dotted line where tokens are missing."""
    for gap in columns.gaps:
        axes.axvline(gap - 0.5, color="#333333", linestyle=":", linewidth=1.2)


def distinct(names: Sequence[str]) -> list[str]:
    """Names as labels; those that look the same when cut get their number in front."""
    shown = [drawable(name) for name in names]
    return [f"{i} {label}" if shown.count(label) > 1 else label for i, label in enumerate(shown)]


def label_experts(axes: Axes, names: Sequence[str], palette: Sequence[str], *, vertical: bool) -> None:
    """Write the experts' names along an axis, each with a mark of its colour."""
    paint, many = expert_colours(palette), len(names) > 12
    size = 6.5 if many else 9
    texts = distinct(names)
    if vertical:
        axes.set_yticks(range(len(names)), texts, fontsize=size)
        labels = axes.get_yticklabels()
    else:
        upright = many or max(map(len, texts)) * len(texts) > 50
        axes.set_xticks(range(len(names)), texts, fontsize=size, rotation=90 if upright else 0)
        labels = axes.get_xticklabels()
    axes.tick_params(axis="y" if vertical else "x", length=0, pad=10)
    across = axes.get_yaxis_transform() if vertical else axes.get_xaxis_transform()
    from matplotlib.transforms import ScaledTranslation

    figure: Any = axes.figure
    away = ScaledTranslation(-5 / 72 if vertical else 0, 0 if vertical else -5 / 72, figure.dpi_scale_trans)
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        plain_text(label)
        x, y = (0, i) if vertical else (i, 0)
        mark = {"marker": "s", "markersize": 4 if many else 6, "color": paint[name], "clip_on": False, "zorder": 5}
        axes.plot([x], [y], transform=across + away, linestyle="none", **mark)  # pyright: ignore


def colours_of(record: RoutingRecord) -> list[str]:
    """The colour of each expert."""
    paint = expert_colours(record.palette)
    return [paint[name] for name in record.experts]


def expert_legend(figure: Figure, record: RoutingRecord, leads: Tensor) -> None:
    """A legend of the experts; of many, those that lead most often."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Patch

    often = leads.sum(0).argsort(descending=True, stable=True)
    named = sorted(often[:NAMED].tolist())
    labels, colours = distinct(record.experts), colours_of(record)
    marks = [Patch(color=colours[i], label=labels[i]) for i in named]
    if len(named) < len(labels):
        marks.append(Patch(alpha=0, label=f"and {len(labels) - len(named)} more"))
    size, renderer = 7, cast(Any, figure.canvas).get_renderer()
    texts = [str(mark.get_label()) for mark in marks]
    widest = max(renderer.get_text_width_height_descent(text, FontProperties(size=size), False)[0] for text in texts)
    entry = widest + 5.5 * size * figure.dpi / 72  # the text, the mark, and the space around it
    across = min(8, len(marks), max(1, int(figure.bbox.width / entry)))
    shown = figure.legend(handles=marks, loc="outside lower center", ncols=across, fontsize=size, frameon=False)
    for label in shown.get_texts():
        plain_text(label)


def token_labels(axes: Axes, columns: Columns) -> None:
    """Label the columns with the text of the tokens, or with positions."""
    axes.tick_params(axis="x", length=0)
    if columns.labels is None:
        count = columns.values.shape[1]
        places = sorted({round(i * (count - 1) / 8) for i in range(9)})
        axes.set_xticks(places, [str(columns.positions[place]) for place in places], fontsize=8)
        axes.set_xlabel("position in the text", fontsize=8)
        return
    axes.set_xticks(range(len(columns.labels)), columns.labels, rotation=90, fontsize=8)
    for label in axes.get_xticklabels():
        label.set_fontfamily("monospace")
        plain_text(label)


def short_layers(names: Sequence[str]) -> list[str]:
    """Names of layers without the modules that contain all of them."""
    return [drawable(name, 40) for name in without_shared_part(names)]


def strip_axes(axes: Axes) -> None:
    """Hide the upper and right side of the frame."""
    axes.spines[["top", "right"]].set_visible(False)


def plain_text(text: Text) -> Text:
    """Turn off mathematics in a text: $ is a dollar sign."""
    text.set_parse_math(False)
    return text


def drawable(text: str, longest: int = LONGEST) -> str:
    """A text as a short label: white space at its ends made visible, characters that the font lacks replaced."""
    if not text.strip():
        return "".join(MARKS.get(character, character) for character in text)[:longest] or MARKS[""]
    inner = text.strip(" ")
    start, end = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    shown = "·" * start + inner + "·" * end
    shown = "".join(MARKS[c] if c in "\n\t\r" else c if c == " " or c in _characters() else MISSING for c in shown)
    half = (longest - 1) // 2
    return shown if len(shown) <= longest else f"{shown[:half]}…{shown[-half:]}"


@functools.cache
def _characters() -> frozenset[str]:
    """The characters that matplotlib's proportional and its monospaced font both have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=family))) for family in ("DejaVu Sans", "DejaVu Sans Mono")]  # pyright: ignore
    return frozenset(chr(code) for code in set.intersection(*(set(font.get_charmap()) for font in fonts)) if code >= 32)
