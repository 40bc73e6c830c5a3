"""The plots of the page, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.timing import Measurement

COLOURS = {"PEFT": "#b3541e", "loramix": "#1f6f8b"}  # told apart by every kind of colour vision
MARKS = {"PEFT": "s", "loramix": "o"}
LIMIT = "#555555"
FINE = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5)
COARSE = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50, 100)


@dataclass(frozen=True)
class Panel:
    """What grows with what.

    Args:
        work: where it was measured.
        begins: of the measurements' names.
        fact: the size that grows.
        axis: its name.
    """

    work: str
    begins: str
    fact: str
    axis: str


ROWS = (
    (
        "a forward",
        ("loramix", "PEFT"),
        (
            Panel("experts", "forward", "experts", "experts E"),
            Panel("ranks", "forward", "ranks", "total rank R"),
            Panel("prefill", "prefill", "text", "tokens S (prefill)"),
            Panel("batch", "forward", "batch", "batch"),
        ),
    ),
    (
        "one token with a cache",
        ("loramix",),
        (
            Panel("experts", "one token", "experts", "experts E"),
            Panel("ranks", "one token", "ranks", "total rank R"),
            Panel("length", "one token", "text", "tokens S before it"),
            Panel("batch", "one token", "batch", "batch"),
        ),
    ),
)


def panels(
    works: dict[str, list[Measurement]],
) -> list[tuple[str, Sequence[str], list[tuple[Panel, list[Measurement]]]]]:
    """The rows of panels of which something was measured: title, contenders, panels with what they show."""
    found: list[tuple[str, Sequence[str], list[tuple[Panel, list[Measurement]]]]] = []
    for title, names, row in ROWS:
        shown = [
            (panel, [m for m in works.get(panel.work, []) if m.work.startswith(panel.begins) and panel.fact in m.facts])
            for panel in row
        ]
        if any(measured for _, measured in shown):
            found.append((title, names, [(panel, measured) for panel, measured in shown if measured]))
    return found


def draw_scaling(works: dict[str, list[Measurement]], target: Path) -> None:
    """Small multiples: the ratios over each size, with quartiles, and the arithmetic limit dashed."""
    plt = _pyplot()
    rows = panels(works)
    columns = max(len(row) for _, _, row in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.6 * columns, 2.7 * len(rows)), sharey="row", squeeze=False, layout="constrained"
    )
    legend: dict[str, Any] = {}
    for line, (title, names, row) in zip(axes, rows, strict=True):
        for axis, (panel, measured) in zip(line, row, strict=False):
            sizes = [m.facts[panel.fact] for m in measured]
            for name in names:
                legend[name] = _ratios(axis, sizes, measured, name)
            limits = [m.limit for m in measured]
            legend["limit"] = axis.plot(sizes, limits, color=LIMIT, linestyle="--", zorder=3)[0]
            legend["base model"] = axis.axhline(1, color="#999999", linewidth=1)
            axis.set(xscale="log", yscale="log", xlabel=panel.axis)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
        for axis in line[len(row) :]:
            axis.set_axis_off()
        top = max(m.ratio(name).upper for _, measured in row for m in measured for name in names)
        ticks = [tick for tick in (FINE if top < FINE[-1] else COARSE) if tick < 1.1 * top]
        line[0].set_ylim(0.93, 1.15 * top)
        line[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        line[0].minorticks_off()
        line[0].set_ylabel(f"{title}:\nCPU time / base model's")
    names = {"limit": "loramix, arithmetic limit"}
    figure.legend(
        legend.values(),
        [names.get(name, name) for name in legend],
        loc="outside upper center",
        ncols=len(legend) if columns > 2 else 2,
        frameon=False,
    )
    _save(figure, target)


def draw_growth(measured: Sequence[Measurement], target: Path) -> None:
    """The ratios of the mixtures by number of generated tokens, with quartiles."""
    figure, axes = _pyplot().subplots(figsize=(6.4, 3.6), layout="constrained")
    lengths = [m.facts["new"] for m in measured]
    for name in COLOURS:
        ratios = [m.ratio(name) for m in measured]
        medians = [r.median for r in ratios]
        bars = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
        axes.errorbar(lengths, medians, bars, marker="o", capsize=3, color=COLOURS[name], label=name)
        for length, median in zip(lengths, medians, strict=True):
            axes.annotate(f"{median:.1f}", (length, median), (0, 7), textcoords="offset points", ha="center")
    axes.axhline(1, color="#777777", linewidth=1, label="base model")
    axes.set(xscale="log", yscale="log", xlabel="generated tokens", ylabel="CPU time / base model's")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0.8, 1.6 * max(m.ratio("PEFT").upper for m in measured))
    ticks = [1, 2, 5, 10, 20, 50, 100]
    top = axes.get_ylim()[1]
    axes.set_yticks([t for t in ticks if t < top], [str(t) for t in ticks if t < top])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, target)


def _ratios(axis: Any, sizes: Sequence[int], measured: Sequence[Measurement], name: str) -> Any:
    ratios = [m.ratio(name) for m in measured]
    medians = [r.median for r in ratios]
    bars = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
    return axis.errorbar(sizes, medians, bars, marker=MARKS[name], markersize=4, capsize=2, color=COLOURS[name])


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "loramix"
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Any, target: Path) -> None:
    figure.savefig(target, metadata={"Date": None})
    _pyplot().close(figure)
