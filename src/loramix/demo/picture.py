"""The picture of the routing: tokens by experts, under the domains that the text really comes from."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from loramix.analysis.show.colours import expert_colours
from loramix.demo.routed import RoutedText

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKENS_A_LINE = 40
"""What stays readable where a README shows the picture."""


def can_draw() -> bool:
    """Whether matplotlib is there: it comes with the extra `plot`."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(routed: RoutedText, path: Path) -> None:
    """Write the picture as PNG: a row for each expert, a column for each token, full colour where an expert has all.

    Args:
        routed: a text; where its domains are known, a bar over the tokens says them.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(routed.tokens) // TOKENS_A_LINE)
    figure = Figure(figsize=(11, 0.5 + 2.5 * lines), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(routed.title, fontsize=13)
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        _draw_line(axes, routed, slice(line * TOKENS_A_LINE, (line + 1) * TOKENS_A_LINE))
    figure.savefig(path)


def _draw_line(axes: Axes, routed: RoutedText, part: slice) -> None:
    from matplotlib.colors import to_rgb

    paint, weights = expert_colours(routed.experts), routed.weights[part]
    pixels = [[(*to_rgb(paint[e]), row[i]) for row in weights] for i, e in enumerate(routed.experts)]
    axes.imshow(pixels, aspect="auto", interpolation="nearest")
    axes.set_xlim(-0.5, TOKENS_A_LINE - 0.5)
    axes.set_xticks(range(len(weights)), [_visible(token) for token in routed.tokens[part]], rotation=90)
    axes.set_yticks(range(len(routed.experts)), routed.experts)
    axes.tick_params(length=0, labelsize=9)
    for label in axes.get_xticklabels():
        label.set_fontfamily("monospace")
    for label, expert in zip(axes.get_yticklabels(), routed.experts, strict=True):
        label.set_color(paint[expert])
        label.set_fontweight("bold")
    axes.set_xticks([x + 0.5 for x in range(len(weights) - 1)], minor=True)
    axes.grid(which="minor", axis="x", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if routed.domains is not None:
        _draw_domains(axes, routed.domains[part], paint)


def _draw_domains(axes: Axes, domains: list[str], paint: dict[str, str]) -> None:
    """A bar over each run of tokens of one domain, in the colour of its expert."""
    start = 0
    for domain, run in itertools.groupby(domains):
        length = len(list(run))
        axes.plot([start - 0.4, start + length - 0.6], [-0.75, -0.75], color=paint[domain], linewidth=4, clip_on=False)
        axes.text(start + length / 2 - 0.5, -0.95, f"text: {domain}", ha="center", va="bottom", fontsize=9)
        start += length


def _visible(token: str) -> str:
    """A token as a label: white space made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
