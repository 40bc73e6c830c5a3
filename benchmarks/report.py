"""The page and the plots of the results of `benchmarks.run`: `python -m benchmarks.report docs/benchmarks.json`."""

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
    "rejected": "All drafts rejected",
    "demo": "Lockstep on the demo mixture",
    "growth": "Growth with length",
    "length": "One token by text length",
    "experts": "Growth with the number of experts",
    "ranks": "Growth with the rank of the experts",
    "batch": "Growth with the batch",
    "compiled": "Compiled",
    "fixed": "Fixed routing",
    "record": "Recording the routing",
    "training": "Training step",
    "memory": "Memory",
    "mixtures": "Several mixtures on one base model",
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

CPU time of loramix, its base model and PEFT's X-LoRA, measured in one process on one thread. Every round runs each of
them once, in rotating order. Ratios are taken within a round. The tables have medians over the rounds, with quartiles
in brackets; the last number in the brackets of a ratio is the number of rounds. Both mixtures have the same experts and
the same router, and their logits were compared before the timing (largest difference {difference:.1e} of the largest
logit). PEFT's X-LoRA generates without a cache. It is so slow that it takes part in one of {every} rounds of `generate`
only.

To measure again and rewrite this page:

```bash
{command}
python -m benchmarks.report docs/benchmarks.json
```

{header}

The limit is the ratio of multiplications. A mixture runs the backbone twice, the experts once and the head once, so a
forward costs (2 ΣW + ΣR(in + out) + head) / (ΣW + head) times the base model's multiplications. ΣW is the number of
weights in all linear layers but the head. Norms and the router are not counted, nor is attention over short texts
(2 · S · H per block, 2 % of ΣW at S 64). In `generate` the head counts for the new tokens only. The limit of `generate`
counts a prompt token like a generated one, although it takes much less time. Prompt tokens have the higher ratio, so
measured ratios can be below the limit.

A training step of the router alone is compared with the base model's forward over the same batch. It has the scaling
pass, the mixture pass, and a backward pass through the activations, which costs as much as the mixture pass: only the
router's weights have gradients. The ratio is (3 ΣW + 2 ΣR(in + out) + 2 head) / (ΣW + head), with one ΣW less if the
scaling pass's hidden states are cached.

Memory is the peak of a step, beyond the weights and the router's gradients, computed exactly from the allocator's
events. The base model's is that of a training forward and backward with frozen weights, with gradients through all
activations. The limit adds, in float32, the low-rank activation (B, S, R) of each adapted layer, the scalings of each
rank column (B, S, R), once if all layers share them, and the scaling pass's hidden states (B, S, H).
"""

SCALING = """
The ratios by number of experts, total rank, text length and batch size; dashed lines are the limits. Top: a forward
over a whole text. Bottom: one token with a cache, which PEFT does not have.

![Ratios to the base model's CPU time over E, R, S and batch, with their limits]({plot})
"""
NOTES = {
    "generate": """With the default decoding, which uses drafts where they are measured to be cheaper. These models have
random weights and repeat themselves, which is the best case for drafts.

""",
    "prefill": """A prompt is read with a cache and logits at its last token only; PEFT has no cache. The limit counts
attention: a token attends to (S + 1) / 2 tokens on average, which is A = H · (S + 1) multiplications per block and
pass, so the limit is (2 (ΣW + A) + ΣR(in + out) + head / S) / (ΣW + A + head / S). The second table has forwards
without a cache and with logits at every token, from the same rounds; their limit has head instead of head / S.

""",
    "decode": """PEFT has no cache: its step is a forward over the text so far, with logits at the last token only.

""",
    "length": """The limit is (2 (ΣW + A) + ΣR(in + out) + head) / (ΣW + A + head), where a token's attention to S
tokens takes A = 2 · S · H multiplications per block and pass. PEFT's step is a forward over the text so far.

""",
    "ranks": """With a fixed number of experts, R = E · r. The limit is that of a forward: the ratio grows by
ΣR(in + out) / (ΣW + head). PEFT's step is a forward over the text so far.

""",
    "batch": """Sequential decoding at every batch size. The limit does not depend on the batch. PEFT's step is a
forward over the text so far of all rows.

""",
    "compiled": """`torch.compile(fullgraph=True)` with the default backend. A decode step writes to a `StaticCache`, of
which a mixture has two, and attends to all of its slots. The first table has base and loramix compiled, in steady
state, the second the eager runs, the third the time of the first calls. The limit counts the multiplications before
compilation. PEFT's X-LoRA sets hooks in its forward, which cannot be traced into one graph.

""",
    "fixed": """One pass with the experts costs (ΣW + ΣR(in + out) + head) / (ΣW + head); a merged model costs as much
as the base model. PEFT cannot fix its routing: the table has its forward of two passes.

""",
    "record": """Sequential decoding. "loramix" is a mixture that was never recorded. The second table has one whose
record has ended, and one inside a record, which keeps the scalings of every token and layer.

""",
    "memory": """A peak is the most bytes that a call holds at once, beyond parameters, from the allocator's events.
Each limit is (base + X) / base, where X is what a mixture must hold in addition to the base model, in float32:

- Parameters: X = 4 · ΣR(in + out), the experts; the router has E · (H + 1) more parameters.
- Cache: X = 4 · 2 · blocks · KV heads · head size · S, keys and values of the scaling pass: a second cache as large as
  the first.
- Forward without a cache, with logits at every token: X = 0. The peak is the logits, 4 · S · vocabulary, which are
  computed once.
- Prefill: X = second cache + 4 · S · (H + 2 R): the scaling pass's last hidden states, and one layer's low-rank
  activation and its gate.
- `generate`: X = second cache, for all tokens that are read. In lockstep both caches are rows of one store that grows
  in chunks of 64 slots, an overhead for short texts.

PEFT keeps no cache. Its `generate` is represented by its last step, over the whole text: a lower bound of its peak.

""",
    "mixtures": """The parameters and buffers of all mixtures that are loaded, each storage once, to those of the base
model alone. The limit is (base + N · 4 · ΣR(in + out)) / base for N mixtures: the base model once, and everyone's
experts. "loramix, a base each" is N models. The forwards choose the other of two mixtures each time.

""",
    "load": """`AutoModelForCausalLM.from_pretrained` alone, compared with the same followed by
`PeftModel.from_pretrained` of the mixture. Loading maps the base model's file without reading it. So there is a limit
only if every parameter is then read once: the bytes of the files, (base + experts + router) / base. PEFT loads the
files that loramix wrote, with absolute paths of the experts' folders, since files that PEFT saves lack the router.

""",
    "lockstep": """Greedy, compared with sequential decoding of the same mixture. The experts are random. A small global
scaling weight keeps the mixture close to its base model, whose drafts are then accepted more often. `lockstep` runs the
scaling pass one token ahead in the same forward; with k drafts it runs k tokens ahead before one forward of the mixture
pass over all of them. By default, `generate` chooses the strategy that it measures to be the cheapest, with drafts from
the text where it repeats itself, as the text of random models often does.

""",
    "rejected": """Vocabulary 4096, layerwise scalings, greedy; the models are forced to generate random tokens, so that
every draft is rejected. By default, `generate` may cost at most 1.05 times sequential decoding; `first` is a generation
before which nothing was measured.

""",
    "demo": """Greedy, 128 tokens after a prompt of each domain; base is the demo's base model (H 256).

""",
    "experts": """Base: Llama, H 1024, 4 blocks, intermediate 2752, 16 heads, vocabulary 32000; otherwise the settings
above.

""",
    "start": """Importing is compared with `import transformers` with the same model class, loading with copying the
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
{machine["torch threads"]} torch thread, load average {machine["load"]} with other processes
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
    """One row for each measurement, without empty columns."""
    rows = [_row(m) for m in measured]
    used = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows)]
    return _markdown([COLUMNS[c] for c in used], [[row[c] for c in used] for row in rows])


def others(measured: Sequence[Measurement]) -> str:
    """The other contenders of the same rounds, one row for each."""
    rows = [
        (m.work, name, _amount(m.amount(name), m.unit), _ratio(m.ratio(name)), _ratio(m.ratio(name, to="loramix")))
        for m in measured
        for name in m.samples
        if name not in CONTENDERS
    ]
    return _markdown(("work", "in the same rounds", "", "/ base", "/ loramix"), rows)


def forwards(measured: Sequence[Measurement]) -> str:
    """Forwards with logits at every token, compared with prefill, one row for each length."""
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
    """Lockstep's drafts and times, one row for each measurement."""
    half = any("bfloat16" in m.facts for m in measured)
    ways = list(dict.fromkeys(way for m in measured for way in m.samples if way not in ("base", "two passes")))
    ways.sort(key=lambda way: way == "loramix")
    names = [f"{'default' if way == 'loramix' else way} / two passes" for way in ways]
    heads = ("work", "accepted drafts", "forwards / token", *names)
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
