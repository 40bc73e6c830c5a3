"""The demo: build a mixture, train its router, save and load it, compare, and show its routing.

Everything it prints is measured in the run that prints it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer

from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.record.recorder import record_routing
from loramix.analysis.show.terminal import legend
from loramix.demo import bundle, corpus
from loramix.demo.compare import Comparison, compare, heldout_columns
from loramix.demo.picture import can_draw, draw
from loramix.demo.router import router_arguments, router_config, router_windows
from loramix.demo.show import comparison_table, explanation, verdict, written_panel
from loramix.demo.text import causal_batch, encode, start_token
from loramix.demo.written import WrittenText, write
from loramix.errors import LoramixError, SaveError
from loramix.formats import check_replaceable
from loramix.model.build import PeftModel, XLoraModel, get_peft_model

PROMPTS = {
    "code": "def read_lines(path):\n    with open(path) as file:\n",
    "prose": "The method returns",
    "math": "Question: Ada has 57 books and gets 68 more. How many books does Ada have now?\n",
    "tables": '{"code": "03B1", "name": "GREEK SMALL LETTER ALPHA", "category": "Ll", "direction": "L"}\n',
}
"""A prompt for each domain."""

_TOKENS_A_PIECE = 20


@dataclass(frozen=True)
class DemoSettings:
    """The size of the demo.

    Args:
        steps: training steps of the router.
        batch: windows in a step.
        windows: held-out windows of each column of the table.
        tokens: tokens generated after each prompt.
        seed: of the router's first weights, its training text, and the sampling.
    """

    steps: int = 80
    batch: int = 8
    windows: int = 16
    tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Attributes:
        comparison: bits per byte of every row and column.
        reload_is_exact: whether the mixture gives the same logits after saving and loading, bit for bit.
        written: for each domain, what the mixture wrote after a prompt.
        switching: the routing of a held-out text that switches domain.
        domains: the domain that each of its tokens comes from.
        mixture: the folder of the trained mixture.
        picture: the picture's file; None without matplotlib.
        seconds: the time of each stage.
    """

    comparison: Comparison
    reload_is_exact: bool
    written: list[WrittenText]
    switching: RoutingRecord
    domains: list[str]
    mixture: Path
    picture: Path | None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def succeeded(self) -> bool:
        """Whether the router beats its rivals and the loaded mixture equals the saved one."""
        return self.comparison.router_earns_its_place and self.reload_is_exact

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON's types."""
        record = self.switching
        return {
            "succeeded": self.succeeded,
            "comparison": asdict(self.comparison),
            "reload_is_exact": self.reload_is_exact,
            "written": [text.to_dict() for text in self.written],
            "switching": {
                "experts": record.experts,
                "domains": self.domains,
                "tokens": record.pieces(),
                "weights": record.weights.tolist(),
            },
            "mixture": str(self.mixture),
            "picture": None if self.picture is None else str(self.picture),
            "seconds": self.seconds,
        }


def run_demo(
    out: str | PathLike[str] = "loramix-demo", settings: DemoSettings | None = None, console: Console | None = None
) -> DemoResult:
    """Run the demo, and print its results.

    Args:
        out: the folder for the trained mixture (`mixture/`) and the picture (`routing.png`).
        settings: the size of the demo; the default takes about a minute on two cores.
        console: where to print.

    Raises:
        SaveError: the folder cannot be written, or what it holds is not from an earlier run.
        LoramixError: the standard library's sources, or a package that training needs, are missing.
    """
    _require_trainer()
    settings, console, clock = settings or DemoSettings(), console or Console(highlight=False), _Clock()
    folder = _usable(Path(out)) / "mixture"
    tokenizer = bundle.tokenizer()
    with clock.stage(console, "1. Build", "a mixture of LoRA experts; base model and experts ship with loramix"):
        model = build(settings, console)
    with clock.stage(console, "2. Train", "the router alone, with transformers.Trainer"):
        train(model, tokenizer, settings, console)
    with clock.stage(console, "3. Save, and load", "onto a fresh base model"):
        model, exact = save_and_load(model, tokenizer, folder, console)
    with clock.stage(console, "4. Compare", "on files that were held out when base, experts and router were trained"):
        comparison = compare(model, heldout_columns(tokenizer, settings.windows))
        for part in (comparison_table(comparison), explanation(comparison), verdict(comparison)):
            console.print(part)
    with clock.stage(
        console, "5. Generate", "from one prompt a domain; each token in the colour of its leading expert"
    ):
        written = generate(model, tokenizer, settings, console)
    with clock.stage(console, "6. Draw", "the routing of a held-out text that switches domain"):
        switching, domains = route_switching(model, tokenizer)
        picture = draw_switching(switching, domains, Path(out), console)
    console.print(f"\nDone in {sum(clock.seconds.values()):.0f} s.", style="bold")
    return DemoResult(comparison, exact, written, switching, domains, folder, picture, clock.seconds)


def build(settings: DemoSettings, console: Console) -> XLoraModel:
    """The mixture, with an untrained router."""
    torch.manual_seed(settings.seed)
    base = bundle.base()
    model = get_peft_model(base, router_config(base.config.hidden_size, bundle.experts()))
    router, everything = model.get_nb_trainable_parameters()
    console.print(f"{type(base).__name__} with the experts {', '.join(model.expert_names)}")
    console.print(f"{len(model.adapted_modules)} adapted layers, {everything - router:,} frozen parameters")
    console.print(f"a router of {router:,} parameters, not yet trained")
    return model


def train(model: XLoraModel, tokenizer: PreTrainedTokenizerFast, settings: DemoSettings, console: Console) -> None:
    """Train the router on training text of all domains."""
    data = router_windows(tokenizer, settings.steps * settings.batch, settings.seed)
    sample = causal_batch([data[i] for i in range(min(len(data), 4 * settings.batch))])
    before = loss(model, sample)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=router_arguments(Path(folder), settings.steps, settings.batch),
            train_dataset=data,
            data_collator=causal_batch,
        )
        trainer.train()
    console.print(f"loss on some of that text: {before:.3f} before, {loss(model, sample):.3f} after")


@torch.no_grad()
def loss(model: XLoraModel, batch: dict[str, Tensor]) -> float:
    """The model's loss on one batch, in evaluation mode."""
    return float(model.eval()(**batch, use_cache=False).loss)


def save_and_load(
    model: XLoraModel, tokenizer: PreTrainedTokenizerFast, folder: Path, console: Console
) -> tuple[XLoraModel, bool]:
    """The mixture after saving and loading, and whether its logits are the same, bit for bit."""
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(bundle.base(), folder)
    assert isinstance(loaded, XLoraModel)
    ids = torch.tensor([[start_token(tokenizer), *encode(tokenizer, "".join(PROMPTS.values()))]])
    with torch.no_grad():
        exact = torch.equal(model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits)
    console.print(f"{folder}: {'the same logits, bit for bit' if exact else '[bold red]DIFFERENT logits[/]'}")
    return loaded, exact


def generate(
    model: XLoraModel, tokenizer: PreTrainedTokenizerFast, settings: DemoSettings, console: Console
) -> list[WrittenText]:
    """The mixture's continuation of each domain's prompt."""
    console.print(legend(model.expert_names, console))
    written: list[WrittenText] = []
    for domain, prompt in PROMPTS.items():
        text = write(model, tokenizer, prompt, title=domain, tokens=settings.tokens, seed=settings.seed)
        console.print(written_panel(text, console))
        written.append(text)
    return written


@torch.no_grad()
def route_switching(model: XLoraModel, tokenizer: PreTrainedTokenizerFast) -> tuple[RoutingRecord, list[str]]:
    """The routing of a short held-out text of all domains, and the domain of each of its tokens."""
    pieces = corpus.switching_pieces(1, held_out=True, piece=60, domains=len(corpus.DOMAINS))[0]
    tokens = [(token, domain) for domain, text in pieces for token in encode(tokenizer, text)[:_TOKENS_A_PIECE]]
    ids = [start_token(tokenizer), *(token for token, _ in tokens)]
    with record_routing(model, tokenizer) as record:
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return record.select(tokens=slice(1, None)), [domain for _, domain in tokens]


def draw_switching(record: RoutingRecord, domains: list[str], out: Path, console: Console) -> Path | None:
    """The file of the picture; None without matplotlib."""
    if not can_draw():
        console.print("no picture: it needs matplotlib, pip install 'loramix\\[plot]'", style="yellow")
        return None
    draw(record, domains, out / "routing.png")
    console.print(f"{out / 'routing.png'}")
    return out / "routing.png"


def _usable(out: Path) -> Path:
    """The folder, created and checked before anything is computed.

    Raises:
        SaveError: it cannot be written, or its mixture is not an earlier run's.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:
        raise SaveError(
            "The demo saves its mixture and its picture.",
            received=f"{str(out)!r}: {error}",
            remedy="name a folder that can be written with --out",
        ) from error
    check_replaceable(out / "mixture")
    return out


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, console: Console, title: str, what: str) -> Generator[None]:
        console.print(f"\n[bold]{title}[/bold]  {what}")
        began = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - began


def _require_trainer() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise LoramixError(
            "The demo trains its router with transformers.Trainer, which needs accelerate.",
            received="no package accelerate",
            remedy="pip install 'loramix[train]'",
        )
