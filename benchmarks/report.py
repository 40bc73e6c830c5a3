"""The page and the plot, from what `benchmarks.run` wrote: `python -m benchmarks.report docs/benchmarks.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generate import PEFT_EVERY
from loramix.speed import Measurement, Spread

TITLES = {
    "forward": "Forward",
    "decode": "One token with a cache",
    "generate": "Generate",
    "lockstep": "Lockstep",
    "demo": "Lockstep on the demo mixture",
    "growth": "Growth with length",
    "length": "One token after a text of some length",
    "experts": "Growth with the number of experts",
    "fixed": "Fixed routing",
    "training": "Training step",
    "start": "Import and load",
}
COLUMNS = ("work", "base", "loramix / base", "limit", "loramix / limit", "target", "PEFT / base", "PEFT / loramix")
PAGE = """# Benchmarks

loramix, its base model and PEFT's X-LoRA side by side in one process, on one thread, in CPU time. Every round runs
each of them once, in turning order; a ratio is taken within a round, and what stands here is the median over the
rounds with the quartiles in brackets. Both mixtures are made of the same expert files and the same router, and their
logits were compared before anything was timed (largest difference {difference:.1e} of the largest logit). PEFT's
X-LoRA generates without a cache, which makes it slow enough to take part in one round of {every} of `generate` only.
The last number in the brackets counts the rounds.

To measure again, then to write this page:

```bash
{command}
python -m benchmarks.report docs/benchmarks.json
```

{header}

The limit is arithmetic: a mixture runs the backbone twice, the experts once and the head once, so a forward costs
(2 ΣW + ΣR(in + out) + head) / (ΣW + head) times the base model's multiplications. ΣW are the weights of all linear
layers but the head; attention scores (2 · S · H a block, 2 % of ΣW at S 64), norms and the router are left out on both
sides. For `generate` the head counts for the new tokens only. Its limit counts a token of the prompt like a generated
one; in time it costs much less (compare a forward of the prompt with one token after it), and since the prompt's tokens
have the higher ratio, what is measured can lie below that limit.

A training step of the router alone is told against the base model's forward over the same batch: the scaling pass, the
mixture pass, and in backward the gradients of the activations, as much again as the mixture pass; no weight but the
router's has one. That is (3 ΣW + 2 ΣR(in + out) + 2 head) / (ΣW + head), and one ΣW less where the scaling pass's
hidden states are kept.

Memory is the most bytes that a step holds at once, beyond weights and gradients of the router: exact, from the
allocator's events. The base model's is that of its own training forward and backward with frozen weights, the gradient
going through all of its activations; the limit adds, in float32, the low-rank activation (B, S, R) of each adapted
layer, the scalings of each rank column (B, S, R), once where all layers share them, and the scaling pass's hidden
states (B, S, H).
"""


NOTES = {
    "lockstep": """Greedy, against the same mixture's two passes one after the other. The experts are random, and the
global scaling weight says how near the mixture is to its base model, whose drafts are asked for. `lockstep` runs the
scaling pass one token ahead in the same forward; with k drafts it runs k tokens ahead before one forward of the mixture
pass over all of them. By itself, `generate` takes whichever it measures to be the cheapest, and its own text where that
repeats itself, as that of random models does often.

""",
    "demo": """Greedy, 128 tokens after a prompt of each domain; base is the demo's base model (H 256).

""",
    "experts": """Base: Llama, H 1024, 4 blocks, intermediate 2752, 16 heads, vocabulary 32000; the other settings are
those above.

""",
    "start": """Importing is told against `import transformers` with the same model class, loading against copying the
base model's tensors.

""",
}


def main(source: Path) -> None:
    """Write `<name>.md` and `<name>.svg` beside `<name>.json`."""
    result = json.loads(source.read_text(encoding="utf-8"))
    works = {name: [Measurement(**m) for m in found] for name, found in result["works"].items()}
    plot = source.with_suffix(".svg")
    text = page(result, works, plot.name if "growth" in works else None)
    source.with_suffix(".md").write_text(text, encoding="utf-8")
    if "growth" in works:
        draw(works["growth"], plot)


def page(result: dict[str, Any], works: dict[str, list[Measurement]], plot: str | None) -> str:
    """The whole page, in Markdown."""
    command = f"python -m benchmarks.run {' '.join(works)} --json docs/benchmarks.json"
    parts = [PAGE.format(command=command, every=PEFT_EVERY, header=header(result), difference=result["difference"])]
    for name in [title for title in TITLES if title in works]:
        measured = works[name]
        parts.append(f"\n## {TITLES[name]}\n\n{NOTES.get(name, '')}{table(measured)}\n")
        if any("against" in m.facts for m in measured):
            parts.append(f"\n{drafts(measured)}\n")
        if name == "growth" and plot is not None:
            parts.append(f"\n![CPU time of generate over the base model's, by number of tokens]({plot})\n")
    return "".join(parts)


def header(result: dict[str, Any]) -> str:
    """Machine, versions and sizes, as a list."""
    machine, size, weights = result["machine"], result["size"], result["weights"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    layers = 7 * size["blocks"]
    kind = "layerwise" if size["layerwise"] else "shared by all layers"
    return f"""\
- Machine: {machine["processor"]} ({machine["instructions"]}), {machine["cores"]} cores, {machine["system"]}; \
{machine["torch threads"]} torch thread, load average {machine["load"]} from all that ran there
- Versions: {versions}
- Base: Llama, H {size["hidden"]}, {size["blocks"]} blocks, intermediate {size["intermediate"]}, \
{size["heads"]} heads, {size["kv_heads"]} KV heads of {size["hidden"] // size["heads"]}, \
vocabulary {size["vocabulary"]}, float32, batch 1
- Mixture: all seven linear layers, L {layers}, E {size["experts"]}, r {size["rank"]}, \
router of depth {size["depth"]}, scalings {kind}
- Weights: ΣW {weights["backbone"] / 1e6:.2f} M, ΣR(in + out) {weights["experts"] / 1e6:.2f} M, head \
{weights["head"] / 1e6:.2f} M"""


def table(measured: Sequence[Measurement]) -> str:
    """One row for each measurement."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_row(m) for m in measured)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def drafts(measured: Sequence[Measurement]) -> str:
    """What lockstep did, one row for each measurement."""
    half = any("bfloat16" in m.facts for m in measured)
    ways = list(dict.fromkeys(way for m in measured for way in m.samples if way not in ("base", "two passes")))
    ways.sort(key=lambda way: way == "loramix")
    names = [f"{'by itself' if way == 'loramix' else way} / two passes" for way in ways]
    heads = ("work", "right drafts", "forwards / token", *names)
    rows = [(*heads, "same tokens in bfloat16") if half else heads]
    rows.append(tuple("---" for _ in rows[0]))
    for m in measured:
        ratios = [_ratio(m.ratio(way, to="two passes")) if way in m.samples else "" for way in ways]
        row = (m.work, f"{m.facts['accepted']:.1%}", f"{m.facts['forwards per token']:.2f}", *ratios)
        rows.append((*row, f"{m.facts['bfloat16']} of {m.facts['new']}") if half else row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(m: Measurement) -> tuple[str, ...]:
    ours = m.ratio("loramix")
    other = "PEFT" in m.samples
    return (
        m.work,
        _amount(m.amount("base"), m.unit),
        _ratio(ours),
        "" if m.limit is None else f"{m.limit:.2f}",
        "" if m.limit is None else f"{ours.median / m.limit:.2f}",
        "" if m.target is None else f"{m.target:.2f}",
        _ratio(m.ratio("PEFT")) if other else "",
        _ratio(m.ratio("PEFT", to="loramix")) if other else "",
    )


def _ratio(s: Spread) -> str:
    if s.rounds == 1:
        return f"{s.median:.3f}"
    return f"{s.median:.2f} ({s.lower:.2f}–{s.upper:.2f}; {s.rounds})"


def _amount(s: Spread, unit: str) -> str:
    factor, shown = {"s": (1e3, "ms"), "B": (1e-6, "MB")}[unit]
    if s.rounds == 1:
        return f"{s.median * factor:.1f} {shown}"
    return f"{s.median * factor:.1f} {shown} ({s.lower * factor:.1f}–{s.upper * factor:.1f})"


def draw(measured: Sequence[Measurement], target: Path) -> None:
    """The ratios of the mixtures by number of tokens, with quartiles, as SVG."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "loramix"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    lengths = [m.facts["new"] for m in measured]
    for name, colour in (("PEFT", "#b3541e"), ("loramix", "#1f6f8b")):
        ratios = [m.ratio(name) for m in measured]
        medians = [r.median for r in ratios]
        bars = [[r.median - r.lower for r in ratios], [r.upper - r.median for r in ratios]]
        axes.errorbar(lengths, medians, bars, marker="o", capsize=3, color=colour, label=name)
        for length, median in zip(lengths, medians, strict=True):
            axes.annotate(f"{median:.1f}", (length, median), (0, 7), textcoords="offset points", ha="center")
    axes.axhline(1, color="#777777", linewidth=1, label="base model")
    axes.set(xscale="log", yscale="log", xlabel="generated tokens", ylabel="CPU time / base model's")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0.8, 1.6 * max(m.ratio("PEFT").upper for m in measured))
    ticks = [1, 2, 5, 10, 20, 50, 100]
    top = axes.get_ylim()[1]
    axes.set_yticks([t for t in ticks if t < top], [str(t) for t in ticks if t < top])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
