"""Writes the pictures and figures of docs/routing.md, and the report of the demo mixture: `make docs`.

docs/routing_report.html is the report, routing_report.png and routing_report_layers.png are pictures of it (they need
Debian's chromium; without one they stay as they are). What the questions in routing.md are answered with is measured
here: an untrained router, the demo's own, one that was trained on code alone, and what each expert is worth on held-out
text of each domain.
"""

from __future__ import annotations

import shutil
import tempfile
import textwrap
from pathlib import Path

import torch
from transformers import Trainer

from loramix import XLoraModel, demo, get_peft_model
from loramix.analysis import Inspection, inspect_texts, plots, write_report
from loramix.demo import corpus
from loramix.demo.router import router_arguments, router_config
from loramix.demo.text import Windows, causal_batch, heldout_passages, windows
from loramix.evaluation import LeaveOneOut, leave_one_out

DOCS = Path(__file__).parent
PAGE = DOCS / "routing.md"
BEGIN, END = "<!-- questions -->\n", "<!-- /questions -->\n"
TEXTS = (
    (
        "A module, its manual, a sum",
        '''def total(prices, discount=0):
    """Add up prices, less a discount."""
    if not prices:
        raise ValueError("no prices")
    return sum(prices) - discount

The function returns the sum of all prices. If the list is empty, an exception is raised; the caller has to
handle it. The argument discount is optional, and its default is zero.

Question: Ada has 57 books and gets 68 more. How many books does Ada have now?
57 + 68 = 125
Answer: 125
''',
    ),
    (
        "Records, code that reads them, a sum",
        """{"code": "03B1", "name": "GREEK SMALL LETTER ALPHA", "category": "Ll", "direction": "L"}
{"code": "03B2", "name": "GREEK SMALL LETTER BETA", "category": "Ll", "direction": "L"}
{"code": "03B3", "name": "GREEK SMALL LETTER GAMMA", "category": "Ll", "direction": "L"}

def read_records(path):
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)

Question: A box holds 12 pens. How many pens do 7 boxes hold?
12 * 7 = 84
Answer: 84
""",
    ),
    (
        "Letters of several bytes",
        "The name of the café is written naïve: é, ï and 😀 take several bytes, and several tokens.\n"
        'print("Grüße", 3 * "é")\n',
    ),
)
SECTION = """### My router ignores its input

`information` is near 0: the mean over all tokens is as undecided as each token alone. The picture of tokens × experts
looks the same from left to right: the leading expert leads by next to nothing, and the strip of leaders is pale. Above,
a router that was never trained; below, that of the demo.

![Weights of the experts along a text: alike in the untrained router, changing in the trained one](routing_ignores.png)

| router | information | entropy of a token | effective experts |
|---|---|---|---|
{routers}

What to do: train the router. Initialise it from texts, `init_router(model, "prompts", …)`. Name the expert of each text
in the data and add the objective `supervised`. Check that the training text has more than one kind of text. See
[Train](training.md).

### One expert takes all

MaxVio is near E − 1, `effective_experts` near 1, and the others hardly ever lead. On text of one kind that is right. On
mixed text the router has collapsed: here a new one, after {steps} steps on code alone, on the three texts of the
report.

![Load and importance of each expert: one leads nearly everywhere](routing_one.png)

What to do: put text of all kinds into the training data. The objective `entropy_floor` keeps the mean over a batch from
collapsing and costs less than `load_balance`, which asks for the same load on all experts. A higher
`softmax_temperature`, or an annealed one, keeps several experts in use while the router learns. What each of them gains
is measured in [Starts and objectives](router.md).

### Which expert hurts

The loss without an expert minus the loss with all. Below 0, the text is predicted better without it. Measured on
held-out text of each domain ({tokens} tokens), in thousandths of a nat a token, ± two standard errors:

| text | {heads} |
|---|{rule}
{losses}

`loramix inspect mixture --data test.jsonl --leave-one-out` prints this table for any text, and its HTML shows it.

{verdict}

What to do where a difference is below 0: look in the report for the tokens that the expert leads. Train the router on
that text with labels (`supervised`), or longer. An expert that helps nowhere can go, `adapters={{…}}` without it. A
difference within two standard errors is unclear: measure on more text before acting on it.
"""


def main() -> None:
    """Measure, draw and write."""
    model, tokenizer = demo.load()
    found = inspect_texts(model, tokenizer, TEXTS, title="The mixture that ships with loramix", leave_out=True)
    write_report(found, DOCS / "routing_report.html")
    photograph(DOCS / "routing_report.html", DOCS / "routing_report.png")
    untrained = inspect_texts(new_mixture(), tokenizer, TEXTS)
    names = ("untrained", "trained")
    plots.comparison(untrained.record, found.record, names).savefig(DOCS / "routing_ignores.png", dpi=80)
    steps = 30
    collapsed = inspect_texts(trained_on_code(steps), tokenizer, TEXTS)
    plots.load_bars(collapsed.record).savefig(DOCS / "routing_one.png", dpi=90)
    losses = {
        domain: leave_one_out(model, [passage.ids for passage in heldout_passages(tokenizer, domain, 16)])
        for domain in corpus.DOMAINS
    }
    require_what_is_said(untrained, found, collapsed)
    routers = {"untrained": untrained, "the demo's": found, "trained on code alone": collapsed}
    section = SECTION.format(
        routers="\n".join(router_row(name, found) for name, found in routers.items()),
        steps=steps,
        tokens=sum(found.tokens for found in losses.values()),
        heads=" | ".join(f"without {name}" for name in corpus.DOMAINS),
        rule="---|" * len(corpus.DOMAINS),
        verdict=verdict(losses),
        losses="\n".join(leave_one_out_row(domain, found) for domain, found in losses.items()),
    )
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + section + END + rest.partition(END)[2], encoding="utf-8")


def require_what_is_said(untrained: Inspection, trained: Inspection, collapsed: Inspection) -> None:
    """Raises SystemExit: the numbers are not those that the sentences of `SECTION` go with."""
    numbers = [found.record.metrics() for found in (untrained, trained, collapsed)]
    experts = len(corpus.DOMAINS)
    ignores = numbers[0].information < 0.05 < 0.3 < numbers[1].information
    if not ignores or numbers[2].effective_experts > 2 or numbers[2].max_violation < 0.8 * (experts - 1):
        raise SystemExit(f"these numbers need other sentences: {numbers}")
    left_out = trained.leave_one_out
    verdicts = {} if left_out is None else {name: left_out.verdict(name) for name in left_out.without}
    if verdicts != dict.fromkeys(corpus.DOMAINS, "unclear") | {"code": "helps"}:
        raise SystemExit(f"README.md says something else of the report: {verdicts}")


def leave_one_out_row(domain: str, found: LeaveOneOut) -> str:
    """A row of the table of what each expert is worth."""
    cells = [f"{1000 * value:+.1f} ± {2000 * found.errors[name]:.1f}" for name, value in found.differences.items()]
    return f"| {domain} | {' | '.join(cells)} |"


def verdict(losses: dict[str, LeaveOneOut]) -> str:
    """What the table says: whether each expert is worth most at home, and where one hurts."""
    rows = {domain: found.differences for domain, found in losses.items()}
    strays = [domain for domain, row in rows.items() if max(row, key=row.__getitem__) != domain]
    told = "Each expert is worth most on its own domain."
    if strays:
        told = f"Not worth most on its own domain is the expert of {', '.join(strays)}."
    hurting = [
        (value, domain, name)
        for domain, row in rows.items()
        for name, value in row.items()
        if losses[domain].verdict(name) == "hurts"
    ]
    if hurting:
        least, domain, expert = min(hurting)
        told += (
            f" What costs most: {domain} would be predicted better by {-1000 * least:.1f} thousandths without the "
            f"{expert} expert. The router gives it too much weight there."
        )
    return textwrap.fill(told, 120)


def router_row(name: str, found: Inspection) -> str:
    """A row of the table of routers."""
    metrics = found.record.metrics()
    return f"| {name} | {metrics.information:.3f} | {metrics.mean_entropy:.3f} | {metrics.effective_experts:.2f} |"


def new_mixture() -> XLoraModel:
    """The demo's experts under a router that was never trained."""
    torch.manual_seed(0)
    base = demo.base()
    model = get_peft_model(base, router_config(base.config.hidden_size, demo.experts()))
    assert isinstance(model, XLoraModel)
    return model


def trained_on_code(steps: int) -> XLoraModel:
    """A new router after some steps on text of one domain."""
    model, tokenizer = new_mixture(), demo.tokenizer()
    rows = Windows(windows(tokenizer, corpus.train_text("code", 300_000), count=8 * steps))
    with tempfile.TemporaryDirectory() as folder:
        arguments = router_arguments(Path(folder), steps, 8)
        Trainer(model, arguments, train_dataset=rows, data_collator=causal_batch).train()
    return model.eval()


def photograph(report: Path, picture: Path) -> None:
    """The report in a browser: pointing at one token; and in dark, with the layers of one opened."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print("no chromium: the pictures of the report stay as they are")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(report.as_uri())
        page.locator(".t").nth(40).hover()
        page.screenshot(path=picture)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
        page.goto(report.as_uri())
        page.locator(".t").nth(40).click()
        page.screenshot(path=picture.with_name(f"{picture.stem}_layers.png"))
        browser.close()


if __name__ == "__main__":
    main()
