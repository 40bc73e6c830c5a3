"""The mixtures that routers are measured on: the demo's, one with experts for other texts, and both together.

The second one adds three experts to the demo's base model: C++ (the headers that come with torch), Python (the sources
of transformers) and English (the descriptions of the installed packages). One file in eight is held out.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from loramix import LoraConfig, XLoraConfig, XLoraModel, get_peft_model
from loramix.demo import bundle, corpus
from loramix.demo.split import is_held_out, stable_hash
from loramix.demo.text import WINDOW, Windows, causal_batch, heldout_passages, switching_passages, windows
from loramix.evaluation.passages import Passage, cut_passages

TRAIN, HELD_OUT = 64, 12
"""Labelled windows of each expert, and held-out windows of each column."""

STEPS, BATCH, RANK = 80, 4, 16
_FILES = 400


@dataclass(frozen=True)
class Case:
    """A mixture to measure, and its text.

    Attributes:
        name: what the tables call it.
        base: makes its base model.
        experts: name -> folder.
        tokenizer: the base model's.
        train: training windows of each expert, labelled by it.
        heldout: held-out passages of each expert's text.
        switching: held-out passages that switch between these.
        trains: whether routers are trained on it as well.
    """

    name: str
    base: Callable[[], PreTrainedModel]
    experts: dict[str, str]
    tokenizer: Any
    train: dict[str, list[list[int]]]
    heldout: dict[str, list[Passage]]
    switching: list[Passage]
    trains: bool = True

    def mixture(self, router: str = "prototypes", **config: Any) -> XLoraModel:
        """A new mixture of these experts, its router at its start."""
        torch.manual_seed(0)
        base = self.base()
        settings = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters=self.experts,
            router=router,
            **config,
        )
        return get_peft_model(base, settings).eval()


def demo(folder: Path | None = None) -> Case:
    """The mixture that ships with loramix; it needs no folder."""
    tokenizer, domains = bundle.tokenizer(), corpus.DOMAINS
    return Case(
        "demo",
        bundle.base,
        bundle.experts(),
        tokenizer,
        {d: windows(tokenizer, corpus.train_text(d, 400_000), count=TRAIN, per_text=2) for d in domains},
        {d: heldout_passages(tokenizer, d, HELD_OUT) for d in domains},
        switching_passages(tokenizer, HELD_OUT),
    )


def installed(folder: Path) -> Case:
    """A mixture of experts for C++, Python and English, trained on the files of installed packages.

    Args:
        folder: where the experts are kept; those that are there are not trained again.
    """
    tokenizer, parts = bundle.tokenizer(), installed_text()
    train = {name: windows(tokenizer, kept, per_text=4) for name, (kept, _) in parts.items()}
    for name, rows in train.items():
        if not (folder / name / "adapter_config.json").is_file():
            _train_expert(rows, folder / name)
    passages = {name: installed_passages(name, held) for name, (_, held) in parts.items()}
    heldout = {n: [p for p in found if len(p.groups) >= 64][:HELD_OUT] for n, found in passages.items()}
    used = STEPS * BATCH
    return Case(
        "installed",
        bundle.base,
        {name: str(folder / name) for name in parts},
        tokenizer,
        {name: (rows[used:] or rows)[:TRAIN] for name, rows in train.items()},
        heldout,
        _switching([found[HELD_OUT:] for found in passages.values()]),
    )


def installed_text() -> dict[str, tuple[list[str], list[str]]]:
    """Texts of C++, Python and English from installed packages: those to train on, and those that are held out."""
    texts = {"cpp": _cpp(), "python": _python(), "english": _english()}
    return {name: _split(found) for name, found in texts.items()}


def installed_passages(name: str, held: Sequence[str]) -> list[Passage]:
    """The first two windows of each of these texts."""
    tokenizer = bundle.tokenizer()
    return [p for text in held for p in list(cut_passages(tokenizer, [(text, name)], window=WINDOW))[:2]]


def together(folder: Path) -> Case:
    """The experts and the text of both: a mixture on which no start and no setting was chosen."""
    one, other = demo(), installed(folder)
    heldout = one.heldout | other.heldout
    return Case(
        "together",
        one.base,
        one.experts | other.experts,
        one.tokenizer,
        one.train | other.train,
        heldout,
        [*one.switching, *other.switching],
        trains=False,
    )


def _switching(pools: Sequence[list[Passage]]) -> list[Passage]:
    """Windows of one piece of each pool, about equally long, in random order."""
    rng, found, room = random.Random(0), list[Passage](), (WINDOW - 1) // len(pools)
    for number in range(HELD_OUT):
        pieces = [pool[number % len(pool)] for pool in pools]
        rng.shuffle(pieces)
        window = Passage(pieces[0].ids[:1], [], [])
        for piece in pieces:
            window.ids.extend(piece.ids[1 : room + 1])
            window.groups.extend(piece.groups[:room])
            window.bytes.extend(piece.bytes[:room])
        found.append(window)
    return found


def train(
    model: PreTrainedModel | XLoraModel,
    rows: Sequence[list[int]],
    *,
    rate: float,
    steps: int,
    batch: int,
    warmup: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train what requires gradients on the next token of these texts, on the CPU; the model stays in training mode."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=warmup,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        data = Windows(rows)
        collator = cast(Any, causal_batch)
        Trainer(cast(Any, model), arguments, train_dataset=data, data_collator=collator, callbacks=[*callbacks]).train()


def _train_expert(rows: Sequence[list[int]], folder: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(bundle.base(), config)
    train(model, rows[: STEPS * BATCH], rate=2e-3, steps=STEPS, batch=BATCH, warmup=5)
    model.save_pretrained(folder)


def _split(files: Iterator[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The texts to train on and those that are held out, by a hash of their names."""
    found = sorted(files, key=lambda file: stable_hash(file[0]))[:_FILES]
    kept = [text for name, text in found if not is_held_out(name)]
    return kept, [text for name, text in found if is_held_out(name)]


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _cpp() -> Iterator[tuple[str, str]]:
    return _below(_package("torch") / "include", "*.h")


def _python() -> Iterator[tuple[str, str]]:
    return _below(_package("transformers"), "*.py")


def _below(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    for path in root.rglob(pattern):
        text = path.read_text(encoding="utf-8", errors="ignore")
        body = "\n".join(text.splitlines()[20:])  # without the licence
        if len(body) > 2000:
            yield str(path.relative_to(root)), body


def _english() -> Iterator[tuple[str, str]]:
    for package in metadata.distributions():
        body = str(package.metadata.get_payload() or "")
        name = str(package.metadata["Name"])
        for number in range(0, min(len(body), 12_000), 3000):
            yield f"{name} {number}", body[number : number + 3000]
