"""Draws docs/architecture.svg: the house, from the layers in pyproject.toml, and the way of a token through it.

`make docs` runs it; a test holds the picture against the modules that exist.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

PICTURE = Path(__file__).with_name("architecture.svg")
SETTINGS = Path(__file__).parent.parent / "pyproject.toml"

WHAT = {
    "adapter": "one expert in memory",
    "auto": "base model and mixture in one call",
    "cache": "two key-value caches in one",
    "checkpoint": "files ↔ experts and routers",
    "classifier": "the router: h → logits",
    "cli": "demo · generate · info",
    "config": "PEFT's fields and files; what cannot work is an error",
    "demo": "a small base model, its experts, the tour",
    "errors": "rule, received, remedy",
    "fixed": "constant scalings, merged into weights",
    "functional": "the stacked product, fast and slow",
    "fused": "the same in two launches, on a GPU",
    "gating": "logits → scalings",
    "hooks": "how training and recording take part",
    "hub": "folder or Hub id → files",
    "inject": "find, number and replace the layers",
    "journal": "files of a cut-off save",
    "json_file": "JSON, or a clear error",
    "kernels": "in Triton: shrink, expand",
    "layers": "y = base(x) + g · Σₑ sₑ cₑ Bₑ Aₑ x, around any base layer",
    "lockstep": "both passes in one forward per token",
    "pace": "which way of decoding is cheapest",
    "window": "tokens read ahead",
    "lazy": "public names, imported at first use",
    "sessions": "the generation that a thread is in",
    "row_cache": "keys and values of both passes, by row",
    "log": "the scalings of past forwards",
    "lora": "one expert, to train it",
    "methods": "what a model can do once experts are put on it",
    "routed_methods": "scalings, setters, the log",
    "generation": "generate, in lockstep",
    "draft_head": "the head in int8, for guesses",
    "speed": "interleaved timing, ratios in pairs",
    "eligible": "where lockstep is exact",
    "fixing": "routing that is fixed",
    "model": "get_peft_model, PeftModel.from_pretrained",
    "names": "names that can be folders",
    "passes": "scaling pass, then mixture pass",
    "rules": "checks of a configuration",
    "single": "a fixed mixture as one adapter",
    "scalings": "the slot that layers read",
    "base_files": "base model and tokenizer → memory",
    "base_layers": "what a layer is to an expert",
    "routing": "what a routing does, in numbers",
    "training": "objectives, initialisation, data, whole runs",
    "targets": "which modules an expert adapts",
}

WIDTH, MARGIN, ROW, GAP = 920, 24, 56, 10
INK, SOFT, LINE, PAPER, WALL = "#1f2430", "#5b6475", "#b9c0cc", "#ffffff", "#f3f5f9"
SCALING, MIXTURE, ROUTER = "#dbe8fb", "#dff3e4", "#fdeccf"
MONO, SANS = "ui-monospace, SFMono-Regular, Menlo, monospace", "system-ui, -apple-system, Segoe UI, sans-serif"


def layers() -> list[list[str]]:
    """The rows of the house, from the top: the modules of each layer that import-linter enforces."""
    contracts = tomllib.loads(SETTINGS.read_text())["tool"]["importlinter"]["contracts"]
    rows = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip() for name in row.replace("|", ":").split(":")] for row in rows]


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
    """One module: its name, and what it is in a few words."""
    return [
        f'<g data-module="{name}">',
        box(x, y, width, ROW - GAP),
        text(x + 10, y + 19, name, size=13, font=MONO, style='font-weight="600"'),
        text(x + 10, y + 34, WHAT[name], size=10.5, fill=SOFT),
        "</g>",
    ]


def house(top: float) -> tuple[list[str], float]:
    """The rows of modules, each row importing only from those below it."""
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
    """One station on a token's way, and by which modules it is done."""
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
            by="passes, cache.base",
        ),
        *step(504, first, 150, ROUTER, "router", "the part that is trained,", "in float32", by="classifier"),
        *step(746, first, 150, ROUTER, "gating", "softmax, temperature,", "top-k", by="gating"),
        *step(
            156,
            second,
            530,
            MIXTURE,
            "mixture pass",
            "the backbone again;",
            formula,
            by="passes, scalings, layers, functional, cache.mixed",
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
        text(MARGIN, 32, "The house", size=18, style=title),
        text(MARGIN, 51, "A row imports only from itself and the rows below it; a check enforces that.", fill=SOFT),
        *rows,
        text(MARGIN, bottom + 34, "The way of a token", size=18, style=title),
        text(MARGIN, bottom + 53, "B, S batch and sequence · H hidden size · L adapted layers · E experts", fill=SOFT),
        *way,
    ]
    height = end + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        'role="img" aria-label="The modules of loramix and the way of a token through the two passes">'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{SOFT}"/></marker></defs>'
    )
    return "\n".join([head, marker, f'<rect width="100%" height="100%" fill="{PAPER}"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
