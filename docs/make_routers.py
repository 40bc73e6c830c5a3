"""Puts the figures of docs/routers.json and docs/one_pass.json into docs/routers.md: `make docs`; a test compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loramix.timing import Measurement

DOCS = Path(__file__).parent
PAGE = DOCS / "routers.md"
MARKS = {name: (f"<!-- {name} -->\n", f"<!-- /{name} -->\n") for name in ("quality", "price")}
TITLES = {
    "demo": "The demo's mixture: code, prose, math and tables",
    "installed": "Experts for C++, Python and English on the demo's base model",
    "together": "Both together: seven experts, on which no start and no setting was chosen",
}


def quality() -> str:
    """What each router gives, a table for each mixture."""
    found = json.loads((DOCS / "routers.json").read_text(encoding="utf-8"))["mixtures"]
    return "\n".join(_table(TITLES[name], case) for name, case in found.items())


def _table(title: str, case: dict[str, Any]) -> str:
    lines = [f"**{title}** ({case['machine']['processor']}):", ""]
    lines += ["| router | made from | mixed | way | switching | way |", "|---|---|---|---|---|---|"]
    for row in case["rows"]:
        cells = [f"{row['bits_per_byte'][c]:.3f} | {row['share'][c]:.0%}" for c in ("mixed", "switching")]
        lines.append(f"| {row['router']} | {row['text']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def price() -> str:
    """What a forward and a token cost with each router."""
    document = json.loads((DOCS / "one_pass.json").read_text(encoding="utf-8"))
    found = [Measurement(**each) for each in document["measurements"]]
    lines = [f"By `python -m benchmarks.one_pass`, on {document['machine']['processor']}:", ""]
    lines += ["| experts | router | work | time / base | limit | time / limit |", "|---|---|---|---|---|---|"]
    for each in found:
        ratio, limit = each.ratio("loramix").median, each.limit or 1.0
        facts = f"{each.facts['experts']} | `{each.facts['router']}` | {each.work}"
        lines.append(f"| {facts} | {ratio:.2f} | {limit:.2f} | {ratio / limit:.2f} |")
    return "\n".join([*lines, ""])


def page() -> str:
    """The page with these figures."""
    text = PAGE.read_text(encoding="utf-8")
    for name, section in {"quality": quality(), "price": price()}.items():
        begin, end = MARKS[name]
        before, _, rest = text.partition(begin)
        text = before + begin + section + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
