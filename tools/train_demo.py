"""Trains what ships in `src/loramix/demo/data`: `python -m tools.train_demo --out DIR`.

Four stages, each seeded, each skipped when its result exists: the tokenizer, the base model, one LoRA expert for each
domain, the router. The log `train.log` is written beside the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from loramix.config.lora import LoraConfig
from loramix.demo import bundle, corpus
from loramix.demo.router import router_arguments, router_config, router_windows
from loramix.demo.text import (
    Windows,
    causal_batch,
    encode,
    heldout_passages,
    start_token,
    switching_passages,
    windows,
)
from loramix.evaluation.scores import measure, total
from loramix.model.build import PeftModel, get_peft_model

START = "<|start|>"
VOCABULARY = 2048

BASE_STEPS = 700
BASE_BATCH = 16
BLEND = {"code": 0.12, "prose": 0.24, "math": 0.20, "tables": 0.26, "switching": 0.18}
BASE_NAME = "loramix-demo-base"

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERT_STEPS = {"code": 600, "prose": 600, "math": 300, "tables": 300}
EXPERT_BATCH = 8

ROUTER_STEPS = 300
ROUTER_BATCH = 8


def train_tokenizer(out: Path, log: Log) -> None:
    """Byte-level BPE, digits one by one, on a sample of the base model's training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[START], initial_alphabet=alphabet, show_progress=False
    )
    sizes = {"code": 2_000_000, "prose": 2_000_000, "math": 400_000, "tables": 400_000}
    texts = itertools.chain.from_iterable(corpus.train_text(domain, size) for domain, size in sizes.items())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=START,
        pad_token=START,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out / "base")
    _compact(out / "base" / "tokenizer.json")
    log(f"vocabulary {len(fast)}, characters a token:")
    for domain in corpus.DOMAINS:
        text = "".join(corpus.heldout_text(domain, 20_000))
        log(f"  {domain:8} {len(text) / len(encode(fast, text)):.2f}")


def train_base(out: Path, log: Log) -> None:
    """A small Llama from scratch on a blend of all domains, stored in bfloat16."""
    tokenizer = bundle.tokenizer(out)
    pools = {domain: windows(tokenizer, corpus.train_text(domain, 6_000_000)) for domain in corpus.DOMAINS}
    pools["switching"] = [passage.ids for passage in switching_passages(tokenizer, 2400, held_out=False)]
    for name, pool in pools.items():
        log(f"  {name:9} {len(pool):6} windows, {BLEND[name]:.0%} of the blend")
    torch.manual_seed(0)
    model = LlamaForCausalLM(base_config(start_token(tokenizer)))
    log(f"parameters {model.num_parameters()}")
    data = _draw(pools, BLEND, BASE_STEPS * BASE_BATCH, seed=0)
    arguments = _arguments(out / "work" / "base", BASE_STEPS, BASE_BATCH, learning_rate=3e-3, weight_decay=0.1)
    _train(model, data, arguments, log)
    model.to(torch.bfloat16).save_pretrained(out / "base")  # pyright: ignore[reportArgumentType]
    log_scores("base", bundle.base(out), tokenizer, log)


def base_config(start: int) -> LlamaConfig:
    """The base model's shape: 3 million parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=576,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=start,
        pad_token_id=start,
    )


def train_experts(out: Path, log: Log) -> None:
    """One LoRA expert for each domain, on that domain's training text only."""
    tokenizer = bundle.tokenizer(out)
    for number, domain in enumerate(corpus.DOMAINS):
        folder = _experts(out)[domain]
        if (folder / "adapter_config.json").exists():
            continue
        log(f"expert {domain}")
        torch.manual_seed(number)
        config = LoraConfig(
            base_model_name_or_path=BASE_NAME,
            r=8,
            lora_alpha=16,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(bundle.base(out), config)
        pool = {domain: windows(tokenizer, corpus.train_text(domain, 4_000_000))}
        data = _draw(pool, {domain: 1.0}, EXPERT_STEPS[domain] * EXPERT_BATCH, seed=number)
        arguments = _arguments(
            out / "work" / domain, EXPERT_STEPS[domain], EXPERT_BATCH, learning_rate=3e-3, weight_decay=0.0
        )
        _train(model, data, arguments, log)
        model.save_pretrained(folder)
        log_scores(domain, model, tokenizer, log)


def train_shipped_router(out: Path, log: Log) -> None:
    """The router that ships: a mixture of the experts, on training text of all domains."""
    tokenizer = bundle.tokenizer(out)
    torch.manual_seed(0)
    base = bundle.base(out)
    config = router_config(base.config.hidden_size, {name: str(folder) for name, folder in _experts(out).items()})
    config.base_model_name_or_path = BASE_NAME
    model = get_peft_model(base, config)
    log(f"router parameters {model.get_nb_trainable_parameters()[0]}")
    arguments = router_arguments(out / "work" / "router", ROUTER_STEPS, ROUTER_BATCH)
    arguments.disable_tqdm = True
    _train(model, router_windows(tokenizer, ROUTER_STEPS * ROUTER_BATCH), arguments, log)
    model.save_pretrained(out / "mixture")
    saved = PeftModel.from_pretrained(bundle.base(out), out / "mixture")
    log_scores("X-LoRA", saved, tokenizer, log)


def log_scores(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, log: Log) -> None:
    """Bits per byte on held-out text of each domain and on text that switches domain."""
    columns = {domain: heldout_passages(tokenizer, domain, 24) for domain in corpus.DOMAINS}
    columns["switching"] = switching_passages(tokenizer, 24)
    for column, passages in columns.items():
        result = total(measure(model, passages).values())
        log(f"  {name:7} held-out {column:10} {result.bits_per_byte:.3f} bits per byte ({result.bytes} bytes)")


def _experts(out: Path) -> dict[str, Path]:
    """Where each expert waits for the mixture, whose folder holds them all in the end."""
    return {domain: out / "work" / "experts" / domain for domain in corpus.DOMAINS}


def _draw(pools: dict[str, list[list[int]]], weights: dict[str, float], count: int, seed: int) -> Windows:
    """`count` full windows, drawn from the pools by weight; a pool is gone through in full before it repeats."""
    rng = random.Random(seed)
    queues: dict[str, list[list[int]]] = {name: [] for name in weights}
    drawn: list[list[int]] = []
    while len(drawn) < count:
        name = rng.choices(list(weights), list(weights.values()))[0]
        if not queues[name]:
            queues[name] = rng.sample(pools[name], len(pools[name]))
        drawn.append(queues[name].pop())
    return Windows(drawn)


def _arguments(folder: Path, steps: int, batch: int, learning_rate: float, weight_decay: float) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 20),
        save_strategy="steps",
        save_steps=max(1, steps // 10),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        remove_unused_columns=False,
    )


def _train(model: PreTrainedModel, data: Windows, arguments: TrainingArguments, log: Log) -> None:
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=causal_batch, callbacks=[_LogCallback(log)]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    began = time.perf_counter()
    earlier = sorted(Path(arguments.output_dir or ".").glob("checkpoint-*"))
    if earlier:
        log(f"  interrupted; goes on from {earlier[-1].name}")
    trainer.train(resume_from_checkpoint=str(earlier[-1]) if earlier else None)
    log(f"  {arguments.max_steps} steps in {time.perf_counter() - began:.0f} s")


class Log:
    """Prints a line and appends it to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class _LogCallback(TrainerCallback):
    def __init__(self, log: Log) -> None:
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.log(f"  step {state.global_step:5}  loss {float(logs['loss']):.4f}")


def _compact(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


DONE = "mixture/adapter_config.json"
STAGES: dict[str, tuple[str, Callable[[Path, Log], None]]] = {
    "tokenizer": ("base/tokenizer.json", train_tokenizer),
    "base": ("base/model.safetensors", train_base),
    "experts": (DONE, train_experts),
    "router": (DONE, train_shipped_router),
}


def main() -> None:
    """Run the stages that have not run yet."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--stage", nargs="*", choices=list(STAGES), default=list(STAGES), help="default: all")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "train.log")
    for name in options.stage:
        result, stage = STAGES[name]
        if (out / result).exists():
            continue
        log(
            f"\n== {name}: Python {platform.python_version()}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}, tokenizers {tokenizers.__version__}, {torch.get_num_threads()} threads"
        )
        began = time.perf_counter()
        stage(out, log)
        log(f"== {name}: {time.perf_counter() - began:.0f} s")
    if (out / DONE).exists():
        shutil.rmtree(out / "work", ignore_errors=True)


if __name__ == "__main__":
    main()
