"""Pictures of a record: tokens × experts, layers × experts, load, entropy along the text, two mixtures.

Each function returns a matplotlib `Figure` of its own and touches neither pyplot nor its state; `figure.savefig(path)`
writes it, and a notebook shows it. An expert has the same colour in each of them (`expert_colours`), and its name.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts. C: columns of a picture, tokens or runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loramix.analysis.compare import drift, in_order_of, same_tokens
from loramix.analysis.metrics import entropy_of, leads_of
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.show.canvas import (
    Columns,
    colours_of,
    columns_of,
    drawable,
    expert_legend,
    label_experts,
    leading_strip,
    mark_gaps,
    new_figure,
    plain_text,
    short_layers,
    strip_axes,
    token_labels,
)
from loramix.analysis.show.heatmap import colour_bar, draw_weights, row_height, scale_of, shades
from loramix.errors import RoutingError
from loramix.experts.selection import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEFT_TO_RIGHT = 11.0  # inches
A_LINE = 40  # tokens whose text stays readable on one line
RUNS = 400  # columns of a text that is too long for that
TALLEST = 19.0  # inches of all lines


def tokens_by_experts(record: RoutingRecord, *, sequence: int | None = None, layer: int | str | None = None) -> Figure:
    """The weight of each expert in each token: a row for each expert, a column for each token.

    The strip above has the colours of the leading experts. A text that is too long for its tokens to be read is shown
    in runs of tokens, by their means.

    Args:
        record: the record.
        sequence: the number of the text; the first one if None.
        layer: one layer; the mean of all if None.

    Raises:
        RoutingError: nothing was recorded, or no such text or layer.
        UnsupportedOperationError: matplotlib is missing.
    """
    text = one_text(record, sequence)
    chosen = text if layer is None else text.select(layers=layer)
    height = 0.25 + row_height(len(record.experts))
    lines = _lines(chosen, most=max(1, int(TALLEST / (height + 1.1))))
    heights = [height for _ in lines]
    across = min(A_LINE, lines[0].values.shape[1])
    wide = LEFT_TO_RIGHT if across > 5 else 7.0
    figure = new_figure(wide, sum(heights) + 1.1 * len(lines) + 0.4)
    where = "mean of all layers" if layer is None and not record.shared else ", ".join(chosen.layers)
    plain_text(figure.suptitle(f"{_title(text)}: weight of each expert, {where}{_runs(lines[0])}"))
    grid = figure.add_gridspec(2 * len(lines), 1, height_ratios=[x for h in heights for x in (0.22, h)])
    image, scale = None, scale_of(*lines)
    for i, columns in enumerate(lines):
        top, below = figure.add_subplot(grid[2 * i]), figure.add_subplot(grid[2 * i + 1])
        leading_strip(top, record, columns, across)
        image = draw_weights(below, record, columns, scale, across)
        token_labels(below, columns)
    colour_bar(figure, image, "weight")
    return figure


def layers_by_experts(record: RoutingRecord, *, position: int | None = None, sequence: int | None = None) -> Figure:
    """The mean scaling of each expert in each layer: a row for each layer, a column for each expert.

    Args:
        record: the record.
        position: of one token; None shows the mean of all.
        sequence: the number of its text; the first one if None.

    Raises:
        RoutingError: nothing was recorded, or no such token.
        UnsupportedOperationError: matplotlib is missing.
    """
    if position is None and sequence is None:
        chosen, what = record, f"mean of {record.kept} tokens"
    else:
        chosen = one_text(record, sequence)
        what = f"{_title(chosen)}, mean of {chosen.kept} tokens"
    if position is not None:
        piece = [text for text, p in zip(chosen.pieces(), chosen.positions.tolist(), strict=True) if p == position]
        if not piece:
            raise RoutingError(
                "A token is named by its position in its text.",
                received=f"position={position!r}, which was not recorded",
                remedy=f"pass one of these: {listed(chosen.positions.tolist())}",
            )
        chosen, what = chosen.select(tokens=position), f"{_title(chosen)}, token {position}: {drawable(piece[0])}"
    values = _mean_by_layer(chosen)
    names, layers = record.experts, short_layers(record.layers)
    height = min(16.0, max(1.0, 0.19 * len(layers)))
    width = min(LEFT_TO_RIGHT, 3.5 + 0.3 * len(names) + 0.06 * max(map(len, layers)))
    figure = new_figure(max(5.5, width), height + 1.6)
    plain_text(figure.suptitle(f"Scaling of each expert by layer, {what}", fontsize=10, wrap=True))
    axes = figure.add_subplot()
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", **shades(values, len(names)))
    each, kinds = max(1, round(len(layers) / (height / 0.16))), len({name.rpartition(".")[2] for name in layers})
    while math.gcd(each, kinds) > 1:  # else only one kind of layer has its name
        each += 1
    axes.set_yticks(range(0, len(layers), each), [layers[i] for i in range(0, len(layers), each)], fontsize=8)
    if record.shared:
        plain_text(axes.set_xlabel(f"one routing for all {len(record.header.adapted)} layers"))
    label_experts(axes, names, record.palette, vertical=False)
    axes.tick_params(length=0)
    colour_bar(figure, image, "scaling")
    return figure


def load_bars(record: RoutingRecord) -> Figure:
    """The load of each expert, how often it leads (the bar), and its importance, its mean scaling (the mark).

    Args:
        record: the record.

    Raises:
        RoutingError: nothing was recorded.
        UnsupportedOperationError: matplotlib is missing.
    """
    metrics, names = record.metrics(), record.experts
    figure = new_figure(min(LEFT_TO_RIGHT, max(5.0, 2.5 + 0.5 * len(names))), 3.8)
    axes = figure.add_subplot()
    paint = colours_of(record)
    bars = axes.bar(range(len(names)), metrics.load, color=paint, edgecolor="#333333", linewidth=0.5, label="load")
    (marks,) = axes.plot(range(len(names)), metrics.importance, "D", color="black", markersize=4, label="importance")
    even = axes.axhline(1 / len(names), color="#555555", linestyle="--", linewidth=1, label=f"even: 1/{len(names)}")
    axes.set_ylabel("share of tokens and layers")
    axes.set_xlim(-0.6, len(names) - 0.4)
    label_experts(axes, names, record.palette, vertical=False)
    kinds = [bars, marks, even]
    axes.legend(handles=kinds, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.17), ncols=3)
    strip_axes(axes)
    plain_text(
        figure.suptitle(
            f"{metrics.tokens} tokens: MaxVio {metrics.max_violation:.2f}, effective experts "
            f"{metrics.effective_experts:.1f} of {len(names)}, dead {metrics.dead_share:.0%}",
            fontsize=10,
        )
    )
    return figure


def entropy_along(record: RoutingRecord, *, sequence: int | None = None) -> Figure:
    """The entropy of the routing along a text: 0 where one expert has all, 1 where all have the same.

    Args:
        record: the record.
        sequence: the number of the text; the first one if None.

    Raises:
        RoutingError: nothing was recorded, or no such text.
        UnsupportedOperationError: matplotlib is missing.
    """
    text = one_text(record, sequence)
    entropy, places = entropy_of(text.scalings).mean(1), torch.arange(text.kept)
    figure = new_figure(LEFT_TO_RIGHT, 3.6)
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 12], hspace=0.02)
    top, axes = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    columns, each_one = columns_of(text, RUNS)[0], columns_of(text, max(101, text.kept))[0]
    leading_strip(top, record, columns, columns.values.shape[1])
    window = max(1, min(25, len(entropy) // 8))
    if len(entropy) <= 2000:
        marker = "o" if window == 1 else ""
        style = {"marker": marker, "markersize": 4, "color": "#9aa5b5", "linewidth": 0.8}
        each_token = [*zip(places.tolist(), entropy.tolist(), strict=True)]
        broken = sorted([*each_token, *((gap - 0.5, math.nan) for gap in each_one.gaps)])
        axes.plot(*zip(*broken, strict=True), label="each token", **style)  # pyright: ignore
    if window > 1:
        smooth = entropy.unfold(0, window, 1).mean(-1)
        for gap in map(int, each_one.gaps):  # a mean of tokens on both sides is of neither
            smooth[max(0, gap - window + 1) : gap] = math.nan
        middle = places[window // 2 :][: len(smooth)]
        axes.plot(middle.numpy(), smooth.numpy(), color="#0072b2", linewidth=1.8, label=f"mean of {window} tokens")
    axes.axhline(float(entropy.mean()), color="black", linestyle="--", linewidth=1, label="mean")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(-0.5, len(entropy) - 0.5)
    token_labels(axes, each_one)
    mark_gaps(axes, each_one)
    axes.set_ylabel("entropy / log E")
    axes.set_xlabel("position in the text; above, the colour of the leading expert, paler where it leads less")
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=3)
    strip_axes(axes)
    expert_legend(figure, record, leads_of(columns.values.T))
    plain_text(figure.suptitle(f"{_title(text)}: entropy of the routing", fontsize=10))
    return figure


def comparison(
    one: RoutingRecord, other: RoutingRecord, names: Sequence[str] = ("one", "other"), *, sequence: int | None = None
) -> Figure:
    """Two mixtures, or two trainings of one, on the same text; with the same layers and experts also their divergence.

    Experts of the same name have the same colour in both, and the same row where both have the same experts.

    Args:
        one: the first record.
        other: the second record, of the same tokens.
        names: the names of the two.
        sequence: the number of the text in `one`; the first one if None.

    Raises:
        RoutingError: nothing was recorded, tokens that differ, no such text, or not two names.
        UnsupportedOperationError: matplotlib is missing.
    """
    if not isinstance(names, list | tuple) or len(names) != 2:
        raise RoutingError("Two records have two names.", received=f"{names!r}", remedy='pass ("before", "after")')
    same_tokens(one, other)
    palette = list(dict.fromkeys([*one.palette, *other.palette]))
    one, other = one.coloured_by(palette), in_order_of(one, other).coloured_by(palette)
    first = one_text(one, sequence)
    second = other.sequence(_counterpart(one, other, first.sequences[0]))
    same_tokens(first, second)
    alike = one.experts == other.experts and one.layers == other.layers
    records, texts = (one, other), (first, second)
    heights = [row_height(len(record.experts)) for record in records]
    ratios = [x for h in heights for x in (0.22, h)] + [0.9] * alike
    figure = new_figure(LEFT_TO_RIGHT, sum(ratios) + 2.4)
    grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
    across = A_LINE if len(first) <= A_LINE else RUNS
    both = [columns_of(text, across)[0] for text in texts]
    image, scale = None, scale_of(*both)
    for i, (record, columns) in enumerate(zip(records, both, strict=True)):
        top, below = figure.add_subplot(grid[2 * i]), figure.add_subplot(grid[2 * i + 1])
        leading_strip(top, record, columns, columns.values.shape[1])
        plain_text(top.set_title(drawable(str(names[i])), fontsize=10, loc="left"))
        image = draw_weights(below, record, columns, scale, 0)
        if i == 1 and not alike:
            token_labels(below, columns)
        else:
            below.set_xticks([])
    if alike:
        axes, columns = figure.add_subplot(grid[4]), both[0]
        divergence = columns.mean(drift(first, second).divergence)
        axes.bar(range(len(divergence)), divergence.numpy(), width=1, color="#555555")
        axes.set_xlim(-0.5, len(divergence) - 0.5)
        axes.set_ylim(0, max(0.05, float(divergence.max()) * 1.05))
        axes.set_ylabel("divergence", fontsize=8)
        mark_gaps(axes, columns)
        strip_axes(axes)
        token_labels(axes, columns)
    colour_bar(figure, image, "weight")
    plain_text(figure.suptitle(f"{_title(first)}: weight of each expert, mean of the layers", fontsize=11))
    return figure


def one_text(record: RoutingRecord, sequence: int | None) -> RoutingRecord:
    """A text of a record, by its number or the first one.

    Raises:
        RoutingError: nothing was recorded, or no such text.
    """
    record.require_measurable()
    return record.sequence(record.sequences[0] if sequence is None else sequence)


def _counterpart(one: RoutingRecord, other: RoutingRecord, number: int) -> int:
    """The number that a text of one record has in another record of the same texts."""
    mine, theirs = (sorted({*record.sequences, *record.header.forks}) for record in (one, other))
    return dict(zip(mine, theirs, strict=False)).get(number, number)


def _title(text: RoutingRecord) -> str:
    return f"Text {text.sequences[0]}" + (", a sample of its tokens" if text.is_sample else "")


def _runs(columns: Columns) -> str:
    return f"; runs of {columns.each} tokens" if columns.each > 1 else ""


def _lines(text: RoutingRecord, most: int) -> list[Columns]:
    """Lines of single tokens, or one of runs where there would be too many."""
    return columns_of(text, A_LINE, most) if len(text) <= A_LINE * most else columns_of(text, RUNS)


def _mean_by_layer(record: RoutingRecord) -> Tensor:
    """(L, E)."""
    total = torch.zeros(len(record.layers), len(record.experts), dtype=torch.float64)
    count = 0
    for part in record.measurable():
        total += part.scalings.double().sum(0)
        count += len(part)
    return (total / count).float()
