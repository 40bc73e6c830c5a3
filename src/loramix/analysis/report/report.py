"""One self-contained HTML file that shows a routing, without other files or a server.

Its parts are in this package: `report.html` is the frame, `report.css` and `report.js` are inserted unchanged. The text
and its weights are data in the page (`loramix.analysis.report.data`); the script makes elements only for the text near
the window, so that a long text stays fast. The page's content security policy allows this one script and this one
style, by their hashes, and nothing else, so that no text can run as code.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from os import PathLike
from pathlib import Path

from loramix.analysis.inspection import Inspection
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.report.data import TOKENS, choose_tokens, document, embedded
from loramix.analysis.report.parts import (
    DARK,
    LIGHT,
    colour_rules,
    experts_list,
    leave_one_out_table,
    numbers_table,
    strips,
)
from loramix.errors import SaveError
from loramix.files.atomic import save_text

_HERE = Path(__file__).parent
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def report_html(inspection: Inspection | RoutingRecord, *, tokens: int = TOKENS) -> str:
    """The report as an HTML page.

    Args:
        inspection: what to show; a record alone does too.
        tokens: the most tokens to show. Of more, runs at even distances are shown, and the page says so.

    Raises:
        RoutingError: nothing was recorded, or scalings that are not finite.
        ConfigurationError: `tokens` is not a whole number of at least 1.
    """
    return _page(inspection, tokens)[0]


def _page(inspection: Inspection | RoutingRecord, tokens: int) -> tuple[str, list[str]]:
    """The page, and the notes in it."""
    found = Inspection(inspection) if isinstance(inspection, RoutingRecord) else inspection
    record = found.record
    metrics, shown = record.metrics(), choose_tokens(record, tokens)
    notes = [*found.all_notes, *shown.notes]
    data = document(found, shown)
    style = _file("report.css") + _theme() + colour_rules(data["colours"])
    script = _file("report.js")
    slots = {
        "title": escape(f"{found.title}: routing"),
        "heading": escape(found.title),
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "notes": "".join(f"<li>{escape(note)}</li>" for note in notes),
        "experts": experts_list(record, metrics),
        "numbers": numbers_table(metrics),
        "strips": strips(record),
        "leave_one_out": leave_one_out_table(found),
        "data": embedded(data),
        "script": script,
    }
    page = _SLOT.sub(lambda slot: slots[slot[1]], _file("report.html"))
    return page.encode("utf-8", "replace").decode("utf-8"), notes  # half a surrogate is no text


def write_report(
    inspection: Inspection | RoutingRecord, path: str | PathLike[str], *, tokens: int = TOKENS
) -> list[str]:
    """Write the report to a file.

    Args:
        inspection: what to show; a record alone does too.
        path: the file; its folder exists.
        tokens: as in `report_html`.

    Returns:
        The notes in the report, a sentence each: what it holds, and what is missing.

    Raises:
        RoutingError, ConfigurationError: as `report_html`.
        SaveError: the file cannot be written.
    """
    page, notes = _page(inspection, tokens)
    place = Path(path)
    check_place(place)
    save_text(place, page)
    return notes


def check_place(path: Path) -> None:
    """Raises SaveError: a file cannot be written there. Checked before a model is loaded."""
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no name may
        raise _unwritable(path, str(error)) from error
    if path.is_dir():
        raise _unwritable(path, "a folder")
    if not path.parent.is_dir():
        raise _unwritable(path, f"{str(path.parent)!r} is no folder")


def _unwritable(path: Path, reason: str) -> SaveError:
    return SaveError(
        "A report is written as a file into a folder that exists.",
        received=f"{str(path)!r}: {reason}",
        remedy="name another file, or make its folder",
    )


def _theme() -> str:
    (paper, ink), (dark_paper, dark_ink) = LIGHT, DARK
    return (
        f":root{{--paper:{paper};--ink:{ink}}}\n"
        f"@media (prefers-color-scheme: dark){{:root{{--paper:{dark_paper};--ink:{dark_ink}}}}}\n"
    )


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
