"""The routing of a mixture: recorded, measured, compared and drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramix._lazy import loaded_at_first_use

if TYPE_CHECKING:
    from loramix.analysis.colours import expert_colours
    from loramix.analysis.compare import Confusion, Drift, agreement, confusion, drift
    from loramix.analysis.inspection import Inspection, inspect_texts
    from loramix.analysis.metrics import RoutingMeter, RoutingMetrics
    from loramix.analysis.record.record import RoutingRecord
    from loramix.analysis.record.recorder import record_routing
    from loramix.analysis.report.report import report_html, write_report
    from loramix.analysis.show.live import RoutingStreamer, WrittenToken, stream_routing

__all__ = [
    "Confusion",
    "Drift",
    "Inspection",
    "RoutingMeter",
    "RoutingMetrics",
    "RoutingRecord",
    "RoutingStreamer",
    "WrittenToken",
    "agreement",
    "confusion",
    "drift",
    "expert_colours",
    "inspect_texts",
    "record_routing",
    "report_html",
    "stream_routing",
    "write_report",
]

_HOMES = {
    "expert_colours": "colours",
    **dict.fromkeys(("Confusion", "Drift", "agreement", "confusion", "drift"), "compare"),
    **dict.fromkeys(("Inspection", "inspect_texts"), "inspection"),
    **dict.fromkeys(("RoutingStreamer", "WrittenToken", "stream_routing"), "show.live"),
    **dict.fromkeys(("RoutingMeter", "RoutingMetrics"), "metrics"),
    "RoutingRecord": "record.record",
    "record_routing": "record.recorder",
    **dict.fromkeys(("report_html", "write_report"), "report.report"),
}

__getattr__ = loaded_at_first_use(__name__, _HOMES)
