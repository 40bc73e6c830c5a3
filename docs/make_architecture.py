"""Draws docs/architecture.svg: the packages of loramix, and the way of a token through them.

The order is that of the layers in pyproject.toml, which import-linter enforces; what a package is for, the first
sentence of its docstring. `make docs` runs it; a test compares the picture with the packages that exist.
"""

from __future__ import annotations

import ast
import tomllib
from html import escape
from pathlib import Path

PICTURE = Path(__file__).with_name("architecture.svg")
SETTINGS = Path(__file__).parent.parent / "pyproject.toml"
SOURCES = Path(__file__).parent.parent / "src" / "loramix"

WIDTH, MARGIN, ROW, GAP = 920, 24, 56, 10
INK, SOFT, LINE, PAPER, WALL = "#1f2430", "#5b6475", "#b9c0cc", "#ffffff", "#f3f5f9"
SCALING, MIXTURE, ROUTER = "#dbe8fb", "#dff3e4", "#fdeccf"
MONO, SANS = "ui-monospace, SFMono-Regular, Menlo, monospace", "system-ui, -apple-system, Segoe UI, sans-serif"


def layers() -> list[list[str]]:
    """The rows from the top: the packages of each layer that import-linter enforces, without private modules."""
    contracts = tomllib.loads(SETTINGS.read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rows = [[name.strip() for name in row.replace("|", ":").split(":")] for row in layers]
    public = [[name for name in row if not name.startswith("_")] for row in rows]
    return [row for row in public if row]


def purpose(name: str) -> str:
    """The first sentence of a package's docstring, up to a semicolon."""
    package = SOURCES / name
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ").partition(";")[0].rstrip(".")


def text(
    x: float, y: float, words: str, *, size: float = 11, font: str = SANS, fill: str = INK, style: str = ""
) -> str:
    look = f'font-family="{font}" font-size="{size}" fill="{fill}" {style}'
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = PAPER) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{LINE}"/>'


def arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="1.5" marker-end="url(#head)"/>'


def module(name: str, x: float, y: float, width: float) -> list[str]:
    """One package: its name, and its purpose."""
    return [
        f'<g data-module="{name}">',
        box(x, y, width, ROW - GAP),
        text(x + 10, y + 19, name, size=13, font=MONO, style='font-weight="600"'),
        text(x + 10, y + 34, purpose(name), size=10.5, fill=SOFT),
        "</g>",
    ]


def house(top: float) -> tuple[list[str], float]:
    """The rows of packages, each row importing only from those below it."""
    rows = layers()
    parts = [box(MARGIN, top, WIDTH - 2 * MARGIN, ROW * len(rows) + GAP + 6, WALL)]
    for number, row in enumerate(rows):
        room = WIDTH - 2 * MARGIN - 5 * GAP
        width = (room - GAP * (len(row) - 1)) / len(row)
        for column, name in enumerate(row):
            parts += module(name, MARGIN + GAP + column * (width + GAP), top + GAP + number * ROW, width)
    right, bottom = WIDTH - MARGIN - 16, top + GAP + ROW * len(rows)
    parts += [
        arrow((right, top + 20), (right, bottom - 14)),
        text(
            right - 6, (top + bottom) / 2, "imports", fill=SOFT,
            style=f'text-anchor="middle" transform="rotate(-90 {right - 6:g} {(top + bottom) / 2:g})"',
        ),
    ]  # fmt: skip
    return parts, bottom + 6


def step(
    x: float, y: float, width: float, fill: str, title: str, *lines: str, by: str = "", height: float = 92
) -> list[str]:
    """One station on a token's way, and the modules that do it."""
    return [
        box(x, y, width, height, fill),
        text(x + 10, y + 20, title, size=12.5, style='font-weight="600"'),
        *(text(x + 10, y + 37 + 14 * row, line, size=10.5, fill=SOFT) for row, line in enumerate(lines)),
        text(x + 10, y + height - 10, by, size=10.5, font=MONO),
    ]


def token(top: float) -> tuple[list[str], float]:
    """The way of a token: first its scalings are made, then the mixture runs with them."""
    first, second, middle = top, top + 156, 46
    formula = "each adapted layer reads its scalings from the slot:  y = base(x) + g · Σₑ s[e] · cₑ · Bₑ Aₑ x"
    everywhere = "the backbone, every scaling = scaling_pass_value,"
    parts = [
        *step(24, first, 92, PAPER, "tokens", "(B, S)", height=second - first + 92),
        *step(
            156,
            first,
            290,
            SCALING,
            "scaling pass",
            everywhere,
            "without gradients or LM head",
            by="passes.two_pass, TwoPassCache.base",
        ),
        *step(504, first, 150, ROUTER, "router", "the part that is trained,", "in float32", by="routers.classifier"),
        *step(746, first, 150, ROUTER, "gating", "softmax, temperature,", "top-k", by="routers.gating"),
        *step(
            156,
            second,
            530,
            MIXTURE,
            "mixture pass",
            "the backbone again;",
            formula,
            by="passes.two_pass, layers.slot, layers.stack, TwoPassCache",
        ),
        *step(746, second, 150, PAPER, "LM head", "logits of the next token"),
        arrow((116, first + middle), (156, first + middle)),
        arrow((116, second + middle), (156, second + middle)),
        arrow((446, first + middle), (504, first + middle)),
        text(470, first + middle - 7, "h", size=12, style='font-style="italic"'),
        text(452, first + middle + 17, "(B, S, H)", size=10, fill=SOFT),
        arrow((654, first + middle), (746, first + middle)),
        text(684, first + middle - 7, "logits", size=11),
        text(672, first + middle + 17, "(B, S, L, E)", size=10, fill=SOFT),
        arrow((821, first + 92), (821, first + 124), (580, first + 124), (580, second)),
        text(600, first + 118, "scalings s (B, S, L, E)", size=11),
        arrow((686, second + middle), (746, second + middle)),
    ]
    return parts, second + 92


def picture() -> str:
    """The SVG."""
    title = 'font-weight="700"'
    rows, bottom = house(62)
    way, end = token(bottom + 64)
    parts = [
        text(MARGIN, 32, "Packages", size=18, style=title),
        text(MARGIN, 51, "A row imports only from the rows below it; import-linter enforces that.", fill=SOFT),
        *rows,
        text(MARGIN, bottom + 34, "The way of a token", size=18, style=title),
        text(MARGIN, bottom + 53, "B, S batch and sequence · H hidden size · L adapted layers · E experts", fill=SOFT),
        *way,
    ]
    height = end + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        'role="img" aria-label="The packages of loramix and the way of a token through the two passes">'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{SOFT}"/></marker></defs>'
    )
    return "\n".join([head, marker, f'<rect width="100%" height="100%" fill="{PAPER}"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
