"""A record in a notebook: static HTML without a script, since notebooks take scripts out of what they do not trust.

E: experts. N: the tokens that are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from jaxtyping import Float
from torch import Tensor

from loramix.analysis.colours import expert_colours
from loramix.analysis.metrics import RoutingMetrics, confidence_of, leaders_of

TOKENS = 300
"""A notebook shows the first tokens only."""


def routing_html(
    note: str,
    metrics: RoutingMetrics,
    experts: Sequence[str],
    palette: Sequence[str],
    pieces: Sequence[str],
    weights: Float[Tensor, "N E"],
) -> str:
    """The note, the experts, and the first tokens in the colours of the leading experts; a tooltip has the weights.

    Args:
        note: what the record holds, in a sentence.
        metrics: those of all its tokens.
        experts: the names of the E experts.
        palette: all experts of the mixture, which the colours go by.
        pieces: the text of the first N tokens.
        weights: their weights, means over the layers.
    """
    paint = expert_colours(palette)
    leaders, confidence = leaders_of(experts, weights), confidence_of(weights).tolist()
    rows = zip(pieces, weights.tolist(), leaders, confidence, strict=True)
    tokens = "".join(_token(piece, experts, row, leader, sure, paint) for piece, row, leader, sure in rows)
    listed = " ".join(
        f'<span style="white-space:nowrap"><span style="color:{paint[name]}">■</span> {escape(name)} {load:.0%}</span>'
        for name, load in zip(experts, metrics.load, strict=True)
    )
    more = metrics.tokens > len(pieces)
    rest = f"<p>… the first {len(pieces)} of {metrics.tokens} tokens</p>" if more else ""
    return (
        f"<div><p>{escape(note)} Effective experts {metrics.effective_experts:.1f}, information "
        f"{metrics.information:.3f}.</p><p>{listed}</p>"
        f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.7">{tokens}</div>{rest}</div>'
    )


def _token(
    piece: str,
    experts: Sequence[str],
    row: Sequence[float],
    leader: str | None,
    confidence: float,
    paint: Mapping[str, str],
) -> str:
    order = sorted(zip(experts, row, strict=True), key=lambda one: (one[0] == leader, one[1]), reverse=True)
    title = ", ".join(f"{name} {weight:.2f}" for name, weight in order[:6])
    strength = round(255 * (0.08 + 0.37 * confidence))  # pale enough to read the text in a dark or a light theme
    style = "" if leader is None else f' style="background-color:{paint[leader]}{strength:02x}"'
    mark = piece.replace("\n", "↵\n") or "▫"
    return f'<span title="{escape(title)}"{style}>{escape(mark)}</span>'
