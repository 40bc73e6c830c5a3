"""The picture of the routing: `tokens_by_experts`, with the domains that the text comes from."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

from loramix.analysis import plots
from loramix.analysis.record.record import RoutingRecord


def can_draw() -> bool:
    """Whether matplotlib is there: it comes with the extra `plot`."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(record: RoutingRecord, domains: Sequence[str], path: Path) -> None:
    """Write the picture as PNG.

    Args:
        record: one text.
        domains: the domain of each of its tokens, named above the tokens.
        path: the file.
    """
    figure = plots.tokens_by_experts(record)
    for line, strip in enumerate(figure.axes[:-1:2]):
        start = 0
        for domain, run in itertools.groupby(domains[line * plots.A_LINE : (line + 1) * plots.A_LINE]):
            length = len(list(run))
            if start:
                strip.axvline(start - 0.5, color="black", linewidth=1.2)
            strip.text(start + length / 2 - 0.5, -0.7, f"text: {domain}", ha="center", va="bottom", fontsize=9)
            start += length
    figure.savefig(path)
