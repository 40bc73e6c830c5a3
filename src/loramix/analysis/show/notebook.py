"""A record in a notebook: static HTML without a script, since notebooks take scripts out of what they do not trust."""

from __future__ import annotations

from html import escape

import torch

from loramix.analysis.metrics import confidence_of, leaders_of
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.show.colours import expert_colours
from loramix.errors import RoutingError

TOKENS = 300


def record_html(record: RoutingRecord) -> str:
    """The note, the experts, and the first tokens in the colours of the leading ones; pointing shows the weights."""
    try:
        metrics = record.metrics()
    except RoutingError as error:
        return f"<p>{escape(str(error) if record.kept else record.note)}</p>"
    first = record.select(tokens=torch.arange(record.kept) < TOKENS)
    paint, weights = expert_colours(record.palette), first.weights
    leaders, sure = leaders_of(record.experts, weights), confidence_of(weights).tolist()
    rows = zip(first.pieces(), weights.tolist(), leaders, sure, strict=True)
    tokens = "".join(_token(piece, record.experts, row, leader, sure, paint) for piece, row, leader, sure in rows)
    experts = " ".join(
        f'<span style="white-space:nowrap"><span style="color:{paint[name]}">■</span> {escape(name)} {load:.0%}</span>'
        for name, load in zip(record.experts, metrics.load, strict=True)
    )
    rest = f"<p>… the first {TOKENS} of {record.kept} tokens</p>" if record.kept > TOKENS else ""
    return (
        f"<div><p>{escape(record.note)} Effective experts {metrics.effective_experts:.1f}, information "
        f"{metrics.information:.3f}.</p><p>{experts}</p>"
        f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.7">{tokens}</div>{rest}</div>'
    )


def _token(
    piece: str, experts: list[str], row: list[float], leader: str | None, confidence: float, paint: dict[str, str]
) -> str:
    order = sorted(zip(experts, row, strict=True), key=lambda one: (one[0] == leader, one[1]), reverse=True)
    title = ", ".join(f"{name} {weight:.2f}" for name, weight in order[:6])
    strength = round(255 * (0.08 + 0.37 * confidence))  # whatever the notebook's ink, text stays readable
    style = "" if leader is None else f' style="background-color:{paint[leader]}{strength:02x}"'
    mark = piece.replace("\n", "↵\n") or "▫"
    return f'<span title="{escape(title)}"{style}>{escape(mark)}</span>'
