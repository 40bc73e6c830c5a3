"""The parts of a report that need no script: experts, metrics, strips along the text, losses without each expert.

Nothing has a style attribute: sizes are in SVG, colours are classes of `colour_rules`, so that the page's content
security policy can forbid inline styles. N: tokens. C: columns of a strip. E: experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

from loramix.analysis.colours import PALETTE
from loramix.analysis.inspection import Inspection
from loramix.analysis.metrics import RoutingMetrics, entropy_of, leading_of
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.report.data import LEVELS, levels_of
from loramix.analysis.show.terminal import leave_one_out_texts
from loramix.evaluation.ablation import LeaveOneOut

COLUMNS = 240
LIGHT, DARK = ("#ffffff", "#1b1c20"), ("#15161a", "#ececf0")
"""Paper and ink."""
CONTRAST = 5.5
"""The least contrast of a token's text with its background; WCAG 2.2 asks for 4.5."""


def colour_rules(classes: Iterable[int]) -> str:
    """CSS: a class for each colour, with its largest share in a token's background, and one for each confidence."""
    chosen = set(classes)
    rules = [
        f".e{i}{{--c:{colour};--light:{strongest(colour, *LIGHT):.2f};--dark:{strongest(colour, *DARK):.2f}}}"
        for i, colour in enumerate(PALETTE)
        if i in chosen
    ]
    rules += [f".s{level}{{--s:{0.2 + 0.8 * level / (LEVELS - 1):.2f}}}" for level in range(LEVELS)]
    return "\n".join(rules)


def strongest(colour: str, paper: str, ink: str) -> float:
    """The largest share of a colour in a background, in hundredths up to 0.8, on which ink keeps its contrast."""
    tint, ground = _rgb(colour), _rgb(paper)
    for hundredths in range(80, 0, -1):
        share = hundredths / 100
        mixed = tuple(share * a + (1 - share) * b for a, b in zip(tint, ground, strict=True))
        if contrast(mixed, _rgb(ink)) >= CONTRAST:
            return share
    return 0.0


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of the luminances of two sRGB colours, the lighter above (WCAG 2.2)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _luminance(colour: tuple[float, ...]) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def experts_list(record: RoutingRecord, metrics: RoutingMetrics) -> str:
    """Each expert with its colour, load and importance."""
    most = max(metrics.load)
    items = [
        f"<li>{_named(record, name)}{_bar(load / most, _colour(record, name))}"
        f'<span class="number">{load:.1%}</span><span class="number faint">{importance:.3f}</span></li>'
        for name, load, importance in zip(record.experts, metrics.load, metrics.importance, strict=True)
    ]
    return _within(f'<ul class="experts">{"".join(items)}</ul>', len(items), "Experts")


def _colour(record: RoutingRecord, name: str) -> int:
    return record.palette.index(name) % len(PALETTE)


def _named(record: RoutingRecord, name: str) -> str:
    """An expert's name, with a mark of its colour."""
    text = escape(name)
    return f'<i class="mark e{_colour(record, name)}"></i><bdi class="name" title="{text}">{text}</bdi>'


def _within(content: str, rows: int, label: str) -> str:
    """Long content in a region that scrolls, with the keyboard too."""
    return (
        content
        if rows <= 12
        else f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'
    )


def _bar(share: float, colour: int) -> str:
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="fill e{colour}" width="{100 * share:.1f}" height="8"/></svg>'
    )


def numbers_table(metrics: RoutingMetrics) -> str:
    """The metrics that do not depend on the expert."""
    rows = [
        f'<tr><th scope="row">{name}</th><td>{value}</td><td class="faint">{meaning}</td></tr>'
        for name, value, meaning in metrics.rows()
    ]
    return f'<table class="numbers">{"".join(rows)}</table>'


def leave_one_out_table(inspection: Inspection) -> str:
    """The change in loss without each expert: bars to the right where it rises, to the left where it falls."""
    found, record = inspection.leave_one_out, inspection.record
    if len(record.palette) == 1:
        return '<p class="faint">One expert: there is none to leave out.</p>'
    if found is None:
        return '<p class="faint">Not measured; <code>loramix inspect … --leave-one-out</code> does.</p>'
    differences = inspection.differences
    most = max(max(map(abs, differences.values())), 1e-9)
    rows = [_leave_one_out_row(record, found, name, most) for name in differences]
    return (
        f"<p>The loss on {found.tokens} tokens is {found.loss:.4f} nats a token. Without the expert it changes by:</p>"
        + (
            '<p class="faint">± two standard errors; unclear where the change is within them.</p>'
            if found.errors
            else ""
        )
        + _within(f'<table class="leave-one-out">{"".join(rows)}</table>', len(rows), "Loss without each expert")
    )


def _leave_one_out_row(record: RoutingRecord, found: LeaveOneOut, name: str, most: float) -> str:
    colour, difference = _colour(record, name), found.differences[name]
    width = 50 * abs(difference) / most
    value, verdict = leave_one_out_texts(found, name)
    return (
        f'<tr><th scope="row">{_named(record, name)}</th>'
        '<td class="wide"><svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="fill e{colour}" x="{50 - width if difference < 0 else 50:.1f}" width="{width:.1f}" height="8"/>'
        '<rect class="axis" x="49.8" width="0.4" height="8"/></svg></td>'
        f"<td>{value}</td><td>{verdict}</td></tr>"
    )


def strips(record: RoutingRecord) -> str:
    """Along the whole record: the leading experts, paler where they lead less clearly, and the entropy."""
    part = record.part
    weights, entropy = part.scalings.mean(1), entropy_of(part.scalings).mean(1)
    each = -(-len(part) // COLUMNS)
    leading, levels = leading_of(weights), levels_of(weights)
    runs, means = leading.split(each), [float(run.mean()) for run in entropy.split(each)]
    width = len(runs)
    paths = _stacked(runs, levels.split(each), record)
    line = "".join(f"{'M' if i == 0 else 'L'}{i} {40 - 40 * mean:.1f}H{i + 1}" for i, mean in enumerate(means))
    what = "a column for each token" if each == 1 else f"a column for each {each} tokens"
    return (
        f'<svg class="strip" viewBox="0 0 {width} 40" preserveAspectRatio="none" role="img" data-each="{each}" '
        f'aria-label="Which experts lead along the text, {what}">{paths}</svg>'
        f'<p class="faint">Leading expert along the text, {what}; paler where it leads less clearly</p>'
        f'<svg class="strip" viewBox="0 0 {width} 40" preserveAspectRatio="none" role="img" data-each="{each}" '
        f'aria-label="Entropy of the routing along the text, {what}; mean {float(entropy.mean()):.2f}">'
        f'<path class="line" d="{line}"/></svg>'
        '<p class="faint">Entropy: at the top all experts have the same weight, at the bottom one has all</p>'
    )


def _stacked(runs: Sequence[Tensor], levels: Sequence[Tensor], record: RoutingRecord) -> str:
    """An SVG path for each expert and confidence, made of one rectangle in each column."""
    parts = defaultdict[tuple[int, int], list[str]](list)
    for x, (leading, level) in enumerate(zip(runs, levels, strict=True)):
        y = 0.0
        for expert in leading[leading >= 0].unique().tolist():
            led = level[leading == expert]
            height = 40 * len(led) / len(leading)
            parts[expert, round(float(led.float().mean()))].append(f"M{x} {y:.2f}h1v{height:.2f}h-1z")
            y += height
    return "".join(
        f'<path class="fill e{_colour(record, record.experts[expert])} s{level}" d="{"".join(shapes)}"/>'
        for (expert, level), shapes in sorted(parts.items())
    )
