"""The demo's router and its training: the same for the router that ships and for the one that the tour trains."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import PreTrainedTokenizerFast, TrainingArguments

from loramix.config.xlora import XLoraConfig
from loramix.demo import corpus
from loramix.demo.text import Windows, switching_passages, windows


def router_config(hidden_size: int, adapters: dict[str, str]) -> XLoraConfig:
    """A small router: one hidden layer, layerwise scalings."""
    return XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=hidden_size,
        adapters=adapters,
        xlora_depth=2,
        xlora_size=32,
        xlora_dropout_p=0.0,
        layerwise_scalings=True,
    )


def router_windows(tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> Windows:
    """`count` training windows: half of them switch domain, the others are divided among the domains."""
    switching = [p.ids for p in switching_passages(tokenizer, count // 2, held_out=False, seed=seed)]
    each = -(-(count - len(switching)) // len(corpus.DOMAINS))
    plain = [
        window
        for domain in corpus.DOMAINS
        for window in windows(tokenizer, corpus.train_text(domain, 300_000), count=each, per_text=2)
    ]
    found = switching + plain[: count - len(switching)]
    random.Random(seed).shuffle(found)
    return Windows(found)


def router_arguments(folder: Path, steps: int, batch: int) -> TrainingArguments:
    """`steps` steps of `batch` windows, with a short warm-up, without checkpoints."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, steps // 5),
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        seed=0,
    )
