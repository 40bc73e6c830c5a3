"""The page and the plots, from what `benchmarks.run` wrote: `python -m benchmarks.report docs/benchmarks.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generate import PEFT_EVERY
from benchmarks.plots import draw_growth, draw_scaling, panels
from loramix.timing import Measurement, Spread

TITLES = {
    "forward": "Forward",
    "prefill": "Prefill",
    "decode": "One token with a cache",
    "generate": "Generate",
    "lockstep": "Lockstep",
    "rejected": "No draft is right",
    "demo": "Lockstep on the demo mixture",
    "growth": "Growth with length",
    "length": "One token after a text of some length",
    "experts": "Growth with the number of experts",
    "ranks": "Growth with the rank of the experts",
    "batch": "Growth with the batch",
    "compiled": "Compiled",
    "fixed": "Fixed routing",
    "record": "Recording the routing",
    "training": "Training step",
    "memory": "Memory",
    "start": "Import and load",
    "load": "Load from files",
}
COLUMNS = (
    "work",
    "base",
    "loramix",
    "PEFT",
    "loramix / base",
    "limit",
    "loramix / limit",
    "target",
    "PEFT / base",
    "PEFT / loramix",
)
CONTENDERS = ("base", "loramix", "PEFT")
PAGE = """# Benchmarks

loramix, its base model and PEFT's X-LoRA side by side in one process, on one thread, in CPU time. Every round runs
each of them once, in turning order; a ratio is taken within a round, and the table has the median over the
rounds with the quartiles in brackets, for times and for ratios. Both mixtures are made of the same expert files and the
same router, and their logits were compared before anything was timed (largest difference {difference:.1e} of the
largest logit). PEFT's X-LoRA generates without a cache, which makes it slow enough to sit out most rounds: of
`generate` it takes part in one of {every}. The last number in the brackets of a ratio counts the rounds.

To measure again, then to write this page:

```bash
{command}
python -m benchmarks.report docs/benchmarks.json
```

{header}

The limit is arithmetic: a mixture runs the backbone twice, the experts once and the head once, so a forward costs
(2 ΣW + ΣR(in + out) + head) / (ΣW + head) times the base model's multiplications. ΣW are the weights of all linear
layers but the head; norms and the router are left out on both sides, and so is attention where texts are short
(2 · S · H a block, 2 % of ΣW at S 64). For `generate` the head counts for the new tokens only. Its limit counts a token
of the prompt like a generated one; in time it costs much less (compare a forward of the prompt with one token after
it), and since the prompt's tokens have the higher ratio, what is measured can lie below that limit.

A training step of the router alone is compared with the base model's forward over the same batch: the scaling pass, the
mixture pass, and in backward the gradients of the activations, as much again as the mixture pass; no weight but the
router's has one. That is (3 ΣW + 2 ΣR(in + out) + 2 head) / (ΣW + head), and one ΣW less where the scaling pass's
hidden states are kept.

Memory is the most bytes that a step holds at once, beyond weights and gradients of the router: exact, from the
allocator's events. The base model's is that of its own training forward and backward with frozen weights, the gradient
going through all of its activations; the limit adds, in float32, the low-rank activation (B, S, R) of each adapted
layer, the scalings of each rank column (B, S, R), once where all layers share them, and the scaling pass's hidden
states (B, S, H).
"""

SCALING = """
How the ratios grow with the number of experts, their total rank, the text and the batch; dashed, the limit. Above, all
tokens of a text are read; below, one token with a cache, which PEFT does not have.

![Ratios to the base model's CPU time over E, R, S and batch, with their limits]({plot})
"""
NOTES = {
    "generate": """By itself: several tokens at once where that is measured to be cheaper. Models of random weights, as
these, repeat themselves, so that their own text is what they are made to guess: the best case.

""",
    "prefill": """A prompt is read with a cache and logits at its last token only; PEFT has no cache. In a long text
attention counts: a token sees (S + 1) / 2 of them on the mean, which is A = H · (S + 1) multiplications a block and
pass, so the limit is (2 (ΣW + A) + ΣR(in + out) + head / S) / (ΣW + A + head / S). The second table has forwards
without a cache and with logits at every token in the same rounds; head in the place of head / S makes their limit.

""",
    "decode": """PEFT has no cache: its step is a forward over the text so far, with logits at the last token only.

""",
    "length": """The limit is (2 (ΣW + A) + ΣR(in + out) + head) / (ΣW + A + head), where a token's attention to S
tokens is A = 2 · S · H multiplications a block and pass. PEFT's step is a forward over the text so far.

""",
    "ranks": """The number of experts fixed, R = E · r. The limit is that of a forward: the ratio grows by
ΣR(in + out) / (ΣW + head). PEFT's step is a forward over the text so far.

""",
    "batch": """Two passes, one after the other, at every batch size. The limit does not know the batch: all parts are
multiplied as often. PEFT's step is a forward over the text so far of all rows.

""",
    "compiled": """`torch.compile(fullgraph=True)` with the default backend; a decode step writes to a `StaticCache`, of
which a mixture has two, and attends to all of its slots. Base and loramix are compiled, in steady state; eager runs
stand in the second table, what the first calls took in the third. The limit is that of what is compiled: nothing that
the compiler saves is in it. PEFT's X-LoRA sets hooks in its forward, which cannot be traced into one graph.

""",
    "fixed": """One pass with the experts costs (ΣW + ΣR(in + out) + head) / (ΣW + head), a merged one what the base
model costs. PEFT cannot fix its routing: the table has its forward of two passes.

""",
    "record": """Two passes, one after the other. loramix is a mixture that was never recorded; beside it one whose
record has ended, and one inside a record, which keeps the scalings of every token and layer.

""",
    "memory": """A peak is the most bytes that a call holds at once, beyond parameters, from the allocator's events.
Each limit is (base + X) / base, where X is what a mixture has to hold beside the base model's own bytes, in float32:

- Parameters: X = 4 · ΣR(in + out), the experts; the router has E · (H + 1) numbers more.
- Cache: X = 4 · 2 · blocks · KV heads · head size · S, keys and values of the scaling pass: a second cache like the
  first.
- Forward without a cache, logits at every token: X = 0. The logits, 4 · S · vocabulary, are the peak, and made once.
- Prefill: X = second cache + 4 · S · (H + 2 R), the scaling pass's last hidden states, and of one layer the low-rank
  activation and its gate.
- `generate`: X = second cache, of all tokens that are read. In lockstep both caches are rows of one store that grows in
  chunks of 64 slots, which is what a short text pays for.

PEFT keeps no cache, and what stands for its `generate` is its last step alone, over the whole text: a lower bound of
its peak.

""",
    "load": """`AutoModelForCausalLM.from_pretrained` alone, against the same and `PeftModel.from_pretrained` of the
mixture. Loading maps the base model's file and reads none of it, so only where every parameter is read once after it
are the bytes of the files a limit: (base + experts + router) / base. PEFT loads the files that loramix wrote, with the
experts' folders as whole paths, since those that PEFT itself saves lack the router.

""",
    "lockstep": """Greedy, against the same mixture's two passes one after the other. The experts are random, and the
global scaling weight says how near the mixture is to its base model, whose drafts are asked for. `lockstep` runs the
scaling pass one token ahead in the same forward; with k drafts it runs k tokens ahead before one forward of the mixture
pass over all of them. By itself, `generate` takes whichever it measures to be the cheapest, and its own text where that
repeats itself, as that of random models does often.

""",
    "rejected": """Vocabulary 4096, scalings for each layer, greedy; random tokens are forced on the models, so that no
draft is right. By itself, `generate` may cost 1.05 times two passes; `first` is a generation before which nothing was
measured.

""",
    "demo": """Greedy, 128 tokens after a prompt of each domain; base is the demo's base model (H 256).

""",
    "experts": """Base: Llama, H 1024, 4 blocks, intermediate 2752, 16 heads, vocabulary 32000; the other settings are
those above.

""",
    "start": """Importing is compared with `import transformers` with the same model class, loading against copying the
base model's tensors.

""",
}


def main(source: Path) -> None:
    """Write `<name>.md` and `<name>.svg` beside `<name>.json`."""
    result = json.loads(source.read_text(encoding="utf-8"))
    works = {name: [Measurement(**m) for m in found] for name, found in result["works"].items()}
    growth, scaling = source.with_suffix(".svg"), source.with_name(f"{source.stem}_scaling.svg")
    source.with_suffix(".md").write_text(page(result, works, growth.name, scaling.name), encoding="utf-8")
    if "growth" in works:
        draw_growth(works["growth"], growth)
    if panels(works):
        draw_scaling(works, scaling)


def page(result: dict[str, Any], works: dict[str, list[Measurement]], growth: str, scaling: str) -> str:
    """The whole page, in Markdown; `growth` and `scaling` are the plots' file names."""
    command = f"python -m benchmarks.run {' '.join(works)} --json docs/benchmarks.json"
    parts = [PAGE.format(command=command, every=PEFT_EVERY, header=header(result), difference=result["difference"])]
    if panels(works):
        parts.append(SCALING.format(plot=scaling))
    for name in [title for title in TITLES if title in works]:
        measured = works[name]
        parts.append(f"\n## {TITLES[name]}\n\n{NOTES.get(name, '')}{tables(measured)}\n")
        if name == "growth":
            parts.append(f"\n![CPU time of generate over the base model's, by number of tokens]({growth})\n")
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


def tables(measured: Sequence[Measurement]) -> str:
    """The section of one work."""
    parts = [table(measured)]
    if any("forward limit" in m.facts for m in measured):
        parts.append(forwards(measured))
    elif any(set(m.samples) - set(CONTENDERS) for m in measured):
        parts.append(others(measured))
    if any("against" in m.facts for m in measured):
        parts.append(drafts(measured))
    if any("compile seconds" in m.facts for m in measured):
        parts.append(compile_times(measured))
    return "\n\n".join(parts)


def table(measured: Sequence[Measurement]) -> str:
    """One row for each measurement; columns in which nothing stands are left out."""
    rows = [_row(m) for m in measured]
    used = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows)]
    return _markdown([COLUMNS[c] for c in used], [[row[c] for c in used] for row in rows])


def others(measured: Sequence[Measurement]) -> str:
    """What else ran in the same rounds, one row for each contender."""
    rows = [
        (m.work, name, _amount(m.amount(name), m.unit), _ratio(m.ratio(name)), _ratio(m.ratio(name, to="loramix")))
        for m in measured
        for name in m.samples
        if name not in CONTENDERS
    ]
    return _markdown(("work", "in the same rounds", "", "/ base", "/ loramix"), rows)


def forwards(measured: Sequence[Measurement]) -> str:
    """Forwards with logits at every token beside prefill, one row for each length."""
    base, ours = "base, forward", "loramix, forward"
    rows = [
        (
            str(m.facts["text"]),
            _amount(m.amount(base), m.unit),
            _amount(m.amount(ours), m.unit),
            _ratio(m.ratio(ours, to=base)),
            f"{m.facts['forward limit']:.2f}",
            _ratio(m.ratio(base)),
            _ratio(m.ratio(ours, to="loramix")),
        )
        for m in measured
    ]
    heads = ("forward of", "base", "loramix", "loramix / base", "limit", "base: / prefill", "loramix: / prefill")
    return _markdown(heads, rows)


def compile_times(measured: Sequence[Measurement]) -> str:
    """Seconds by the clock of the first calls, one row for each measurement."""
    rows = [(m.work, *(f"{m.facts['compile seconds'][name]:.1f} s" for name in CONTENDERS[:2])) for m in measured]
    return _markdown(("compile, by the clock", *CONTENDERS[:2]), rows)


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


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _row(m: Measurement) -> tuple[str, ...]:
    ours = m.ratio("loramix")
    other = "PEFT" in m.samples
    return (
        m.work,
        *(_amount(m.amount(name), m.unit) if name in m.samples else "" for name in CONTENDERS),
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
