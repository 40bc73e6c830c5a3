"""Weights as colours: a heat map of experts × tokens, and its colour scale.

E: experts. C: columns, each a token or a run of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.show.canvas import Columns, label_experts, mark_gaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WEIGHTS = "Blues"  # lightness alone tells more from less, whatever the colour vision
SIGNED = "RdBu"  # blue for more than 0 as above, red for less


def row_height(experts: int) -> float:
    """The height of a row for each expert, in inches."""
    return max(0.5, (0.26 if experts <= 12 else 0.125) * experts)


def draw_weights(axes: Axes, record: RoutingRecord, columns: Columns, scale: dict[str, Any], across: int) -> Any:
    """A row for each expert, a column for each token or run; lines of single tokens are `across` columns wide."""
    image = axes.imshow(columns.values.numpy(), aspect="auto", interpolation="nearest", **scale)
    mark_gaps(axes, columns)
    count = columns.values.shape[1]
    axes.set_xlim(-0.5, (max(across, count) if columns.each == 1 else count) - 0.5)
    label_experts(axes, record.experts, record.palette, vertical=True)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def scale_of(*several: Columns) -> dict[str, Any]:
    """One colour scale for several pictures."""
    values = torch.cat([columns.values.flatten() for columns in several])
    return shades(values, min(len(columns.values) for columns in several))


def shades(values: Tensor, experts: int) -> dict[str, Any]:
    """The colour scale: one hue from 0 on; two where some values are negative, as logits in "hard" routing are.

    The largest value is darkest, or twice the even share if that is larger: an even routing looks pale.
    """
    most = max(float(values.max()), min(1.0, 2 / experts))
    if float(values.min()) >= 0:
        return {"cmap": WEIGHTS, "vmin": 0, "vmax": most}
    most = max(most, -float(values.min()))
    return {"cmap": SIGNED, "vmin": -most, "vmax": most}


def colour_bar(figure: Figure, image: Any, what: str) -> None:
    """The legend of the colour scale."""
    figure.colorbar(image, ax=figure.axes, shrink=0.6, aspect=30, pad=0.01, label=what)
