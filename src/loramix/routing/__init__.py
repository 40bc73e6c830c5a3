"""What a mixture's routing does, seen from outside the core: recorded, measured, compared, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loramix.lazy import loaded_at_first_use

if TYPE_CHECKING:
    from loramix.routing.ablation import LeaveOneOut, leave_one_out
    from loramix.routing.colours import expert_colours
    from loramix.routing.compare import Confusion, Drift, agreement, confusion, drift
    from loramix.routing.inspection import Inspection, inspect_texts
    from loramix.routing.live import RoutingStreamer, WrittenToken, stream_routing
    from loramix.routing.metrics import RoutingMeter, RoutingMetrics
    from loramix.routing.record import RoutingRecord
    from loramix.routing.recorder import record_routing
    from loramix.routing.report import report_html, write_report

__all__ = [
    "Confusion",
    "Drift",
    "Inspection",
    "LeaveOneOut",
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
    "leave_one_out",
    "record_routing",
    "report_html",
    "stream_routing",
    "write_report",
]

_HOMES = {
    **dict.fromkeys(("LeaveOneOut", "leave_one_out"), "ablation"),
    "expert_colours": "colours",
    **dict.fromkeys(("Confusion", "Drift", "agreement", "confusion", "drift"), "compare"),
    **dict.fromkeys(("Inspection", "inspect_texts"), "inspection"),
    **dict.fromkeys(("RoutingStreamer", "WrittenToken", "stream_routing"), "live"),
    **dict.fromkeys(("RoutingMeter", "RoutingMetrics"), "metrics"),
    "RoutingRecord": "record",
    "record_routing": "recorder",
    **dict.fromkeys(("report_html", "write_report"), "report"),
}

__getattr__ = loaded_at_first_use(__name__, _HOMES)
