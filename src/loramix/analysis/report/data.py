"""The data in a report: tokens, and their weights as bytes, up to a size that a browser handles easily.

A weight is quantised to 255 steps between the least and the largest scaling of the record, so that its error is at
most a 510th of that range; confidence and entropy take two bytes. Leading experts are computed before quantisation.

N: tokens of the report. M: those of them with their layers. L: adapted layers. E: experts.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loramix.analysis.colours import PALETTE
from loramix.analysis.inspection import Inspection
from loramix.analysis.metrics import confidence_of, entropy_of, leading_of
from loramix.analysis.record.header import without_shared_part
from loramix.analysis.record.record import RoutingRecord
from loramix.config.checks import require_integer

TOKENS = 100_000
WEIGHT_BYTES = 4_000_000
LAYER_BYTES = 3_000_000
RUN = 256  # tokens that stay together where not all are shown
LEVELS = 8  # of confidence


@dataclass(frozen=True)
class ReportTokens:
    """The tokens of a report.

    Attributes:
        record: these tokens alone.
        rows: their places in the whole record.
        with_layers: the places, among these tokens, of those whose layers the report holds too.
        notes: what is missing, a sentence each.
    """

    record: RoutingRecord
    rows: Int[Tensor, " N"]
    with_layers: Int[Tensor, " M"]
    notes: list[str]


def choose_tokens(record: RoutingRecord, tokens: int = TOKENS, layer_bytes: int = LAYER_BYTES) -> ReportTokens:
    """The tokens that a report shows: all, or runs of them at even distances.

    Args:
        record: the record.
        tokens: the most tokens; fewer where there are many experts.
        layer_bytes: the most bytes of scalings by layer.

    Raises:
        ConfigurationError: `tokens` is not a whole number of at least 1.
    """
    require_integer("tokens", tokens, at_least=1, remedy=f"Pass for example tokens={TOKENS}.")
    count, experts, layers = record.kept, len(record.experts), len(record.layers)
    most = min(tokens, max(RUN, WEIGHT_BYTES // experts))
    notes: list[str] = []
    rows = torch.arange(count)
    if count > most:
        run = min(RUN, most)
        starts = _evenly(-(-count // run), most // run) * run
        rows = (starts[:, None] + torch.arange(run)).flatten()
        rows = rows[rows < count]
        notes.append(
            f"The report shows {len(rows)} of {count} tokens, runs of {run} at even distances; numbers and strips are "
            "those of all."
        )
        keep = torch.zeros(count, dtype=torch.bool)
        keep[rows] = True
        record = record.select(tokens=keep)
    with_layers = torch.zeros(0, dtype=torch.long)
    if not record.shared:
        with_layers = _evenly(len(rows), max(1, layer_bytes // (layers * experts)))
        if len(with_layers) < len(rows):
            notes.append(f"Layers can be looked at in {len(with_layers)} of the tokens shown, at even distances.")
    return ReportTokens(record, rows, with_layers, notes)


def _evenly(count: int, most: int) -> Tensor:
    """At most `most` numbers below `count` at even distances, the first and the last one included."""
    return torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).round().long()


def document(inspection: Inspection, shown: ReportTokens) -> dict[str, Any]:
    """The data that the page's script reads; arrays are base64, weights rounded to 1/255 of their range."""
    record = shown.record
    part, experts = record.part, record.experts
    weights, pieces = part.scalings.mean(1), record.pieces()
    low, high = min(0.0, float(part.scalings.min())), max(float(part.scalings.max()), 1e-9)
    return {
        "experts": experts,
        "colours": [record.palette.index(name) % len(PALETTE) for name in experts],
        "layers": [] if record.shared else without_shared_part(record.layers),
        "adapted": len(record.header.adapted),
        "shared": record.shared,
        "texts": {number: inspection.name_of(number) for number in record.sequences},
        "forks": {number: [inspection.name_of(other), place] for number, (other, place) in record.header.forks.items()},
        "runs": [[i, int(part.sequence[i]), int(part.position[i]), int(shown.rows[i])] for i in part.run_starts()],
        "pieces": pieces,
        "low": low,
        "high": high,
        "leading": _base64(leading_of(weights).short()),
        "level": _base64(levels_of(weights).byte()),
        "confidence": _base64(_words(confidence_of(weights))),
        "entropy": _base64(_words(entropy_of(part.scalings).mean(1))),
        "weights": _base64(_bytes(weights, low, high)),
        "layerTokens": _base64(shown.with_layers.int()),
        "layerLeading": _base64(leading_of(part.scalings[shown.with_layers]).short()),
        "layerWeights": _base64(_bytes(part.scalings[shown.with_layers], low, high)),
    }


def levels_of(weights: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
    """The confidence in `LEVELS` steps."""
    return (confidence_of(weights).sqrt() * LEVELS).long().clamp(max=LEVELS - 1)  # of many experts, none leads by much


def _bytes(values: Tensor, low: float, high: float) -> Tensor:
    return ((values - low) / (high - low) * 255).round().clamp(0, 255).byte()


def _words(shares: Tensor) -> Tensor:
    return (shares * 65535).round().clamp(0, 65535).to(torch.uint16)


def _base64(values: Tensor) -> str:
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def embedded(value: object) -> str:
    """JSON for a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "replace").decode("utf-8")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
