"""A whole run: build, train with TRL's SFTTrainer, save, evaluate. `loramix.training.check` checks all of it before.

The output folder of a run:

    settings.json           the settings it was started with
    start/                  the mixture before its training, where the best router is kept
    checkpoint-<step>/      the trainer's, each a mixture that `PeftModel.from_pretrained` loads
    mixture/                the trained mixture
    evaluation.json         the figures of `loramix eval`, if there is data to evaluate with
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from loramix.analysis.metrics import RoutingMeter
from loramix.errors import ConfigurationError, LoramixError
from loramix.evaluation.passages import Passage, cut_passages, pad, window_size
from loramix.evaluation.scores import Evaluation, evaluate, measure
from loramix.files.base_models import load_base, one_line
from loramix.files.json_file import write_json
from loramix.model.build import XLoraModel, get_peft_model
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import observing
from loramix.training.check import CheckedRun, check, check_expert
from loramix.training.checkpoints import (
    SETTINGS,
    compare_settings,
    is_finished,
    last_complete_checkpoint,
    load_state,
    load_trained,
    remove_checkpoints,
)
from loramix.training.data import ExpertLabels, Row
from loramix.training.dataset import pieces, to_dataset
from loramix.training.initialise import STARTS, init_router
from loramix.training.keep_start import KeepStart
from loramix.training.objectives import (
    FiniteGradients,
    RouterCallback,
    dead_experts,
    real_tokens,
    restore_temperature,
)
from loramix.training.recall import ScalingPassCache
from loramix.training.settings import ExpertSettings, TrainSettings


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a run.

    Attributes:
        model: the trained mixture.
        folder: where it was saved.
        evaluation: its evaluation, where there is data for it; in the main process alone.
        dead: the dead experts of a mixture with new ones: on the text to evaluate with, else on the last text of the
            training; None without new ones.
    """

    model: XLoraModel
    folder: Path
    evaluation: Evaluation | None
    dead: Sequence[str] | None = None


_ROWS = 16
"""Rows for each expert that a start from unlabelled text reads."""


def run_training(settings: TrainSettings, *, resume: bool = True, tell: Callable[[str], object] = id) -> TrainingResult:
    """Train the router of a mixture, and its new experts, from files to a saved mixture.

    With text to evaluate with, the mixture that predicts it best is kept, its start included (`trainer_arguments`).

    Args:
        settings: the run's settings.
        resume: continue from the last complete checkpoint in the output folder, if there is one.
        tell: called with a line about how the router starts; about new experts; and about dead ones.

    Raises:
        LoramixError: what stops it; checkpoints that were saved stay.
    """
    checked = check(settings)
    arguments, output = checked.arguments, Path(settings.output)
    last = last_complete_checkpoint(output) if resume else None
    if last is not None:
        compare_settings(output, settings)
    set_seed(arguments.seed)
    model = get_peft_model(load_base(settings.base, settings.revision, checked.dtype), checked.config)
    if last is None:
        tell(f"The router starts from {checked.start}: {STARTS[checked.start]}.")
        if checked.plan.new_experts:
            tell(
                f"New experts train with it: {', '.join(checked.plan.new_experts)}; "
                f"objectives.load_balance: {checked.objectives.load_balance}."
            )
        _initialise(model, checked)
    tokenizer = with_padding(checked.tokenizer)
    callback = _Callback(checked.objectives)
    packed = arguments.packing or arguments.padding_free
    trainer = build_trainer(
        model, arguments, tokenizer, checked.rows, checked.eval_rows, callback=callback, labels=not packed
    )
    if not packed:
        trainer.data_collator = ExpertLabels(trainer.data_collator, model.expert_names)
    callback.first_of(trainer)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        if not resume:
            remove_checkpoints(output)
        write_json(output / SETTINGS, asdict(settings))
    folder, keep = output / "mixture", KeepStart(output)
    keeps = arguments.load_best_model_at_end and not trainer.is_fsdp_enabled  # shards are not put back by hand
    if last is not None and is_finished(last, arguments):
        chosen = load_trained(model, last, best=arguments.load_best_model_at_end)
        restore_temperature(model, chosen)
        if keeps:
            keep.restore(model, trainer.args, load_state(last))
        if trainer.is_world_process_zero():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    else:
        if keeps:
            trainer.add_callback(keep)
            if last is None:
                trainer.save_model(str(keep.folder))
        _train(model, trainer, settings, last)
        if keeps:
            keep.restore(model, trainer.args, asdict(trainer.state))
        trainer.save_model(str(folder))
    evaluation, text = None, "the last text of the training"
    dead = callback.dead if checked.plan.new_experts else None
    if checked.eval_rows and (trainer.is_world_process_zero() or trainer.is_fsdp_enabled):  # shards: all take part
        evaluation = evaluate_rows(model, tokenizer, checked.eval_rows)
        if dead is not None:
            dead, text = _dead(model, tokenizer, checked.eval_rows), "the text to evaluate with"
    if not trainer.is_world_process_zero():
        return TrainingResult(model, folder, None)
    if dead:
        tell(dead_experts(dead, text))
    told = {} if dead is None else {"dead_experts": dead}
    if evaluation is not None:
        write_json(output / "evaluation.json", evaluation.to_dict() | told)
    return TrainingResult(model, folder, evaluation, dead)


def _dead(model: XLoraModel, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    used = _Used()
    with observing(model, used):
        measure(model, _passages(model, tokenizer, rows))
    metrics = used.meter.result()
    return [] if metrics is None else [model.expert_names[expert] for expert in metrics.dead]


class _Callback(RouterCallback):
    """Leaves it to the run to tell of dead experts, which it may know from other text."""

    def report(self) -> None:
        pass


class _Used(RoutingHook):
    """Measures how much the experts are used."""

    def __init__(self) -> None:
        self.meter = RoutingMeter()

    def routed(self, output: RouterOutput) -> None:
        self.meter.add(output.final, real_tokens(output))


def build_trainer(
    model: PreTrainedModel,
    arguments: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    eval_rows: Sequence[Row],
    *,
    callback: TrainerCallback,
    labels: bool = False,
) -> Any:
    """TRL's SFTTrainer for rows of text.

    Raises:
        ConfigurationError: arguments that TRL refuses, for this model, tokenizer and data.
    """
    from trl.trainer.sft_trainer import SFTTrainer

    try:
        return SFTTrainer(
            cast(Any, model),
            arguments,
            train_dataset=to_dataset(rows, tokenizer, arguments.max_length, labels=labels),
            eval_dataset=to_dataset(eval_rows, tokenizer, arguments.max_length) if eval_rows else None,
            processing_class=tokenizer,
            callbacks=[callback],
        )
    except LoramixError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigurationError(
            "TRL's SFTTrainer takes the trainer's arguments, for this tokenizer and this data.",
            received=one_line(error),
            remedy="Correct them; https://huggingface.co/docs/trl/sft_trainer lists them.",
        ) from error


def _train(model: XLoraModel, trainer: Any, settings: TrainSettings, last: Path | None) -> None:
    folder, size = None if last is None else str(last), settings.cache_bytes
    if size is None:
        trainer.train(resume_from_checkpoint=folder)
        return
    with ScalingPassCache(model, max_bytes=size, folder=settings.cache_folder):
        trainer.train(resume_from_checkpoint=folder)


def _initialise(model: XLoraModel, checked: CheckedRun) -> None:
    size = checked.arguments.max_length
    if checked.start == "prompts":
        init_router(model, "prompts", tokenizer=checked.tokenizer, prompts=checked.prompts)
    elif checked.start == "labels":
        batches = labelled_batches(checked.rows, checked.tokenizer, model.expert_names, size=size)
        init_router(model, "labels", batches=batches)
    elif checked.start == "text":
        count = min(len(checked.rows), _ROWS * len(model.expert_names))
        cut = (pieces(row, checked.tokenizer, size) for row in random.Random(0).sample(checked.rows, count))
        batches = [{"input_ids": torch.tensor([piece])} for found in cut for piece in found if len(piece) > 1]
        init_router(model, "text", batches=batches)
    elif checked.start == "zeros":
        init_router(model, "zeros")


def labelled_batches(
    rows: Sequence[Row], tokenizer: Any, experts: Sequence[str], *, size: int | None
) -> list[Mapping[str, torch.Tensor]]:
    """The rows that name their expert, in pieces of at most `size` tokens, as batches for `init_router`."""
    return [
        {"input_ids": torch.tensor([piece]), "expert_ids": torch.tensor([experts.index(row.expert)])}
        for row in rows
        if row.expert is not None
        for piece in pieces(row, tokenizer, size)
    ]


def unlabelled_batches(
    model: XLoraModel,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    window: int | None = None,
    limit: int | None = None,
    size: int = 4,
) -> list[Mapping[str, torch.Tensor]]:
    """Rows as batches of passages, for `distil_router` and `init_router`, in an order that mixes the rows.

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        rows: the text.
        window: as for `evaluate_rows`.
        limit: the most passages, of all rows alike.
        size: passages in a batch.

    Raises:
        DataError: as for `evaluate_rows`.
    """
    texts = ((row.as_text(tokenizer), "") for row in rows)
    passages = [passage.ids for passage in cut_passages(tokenizer, texts, window=window_size(model.config, window))]
    random.Random(0).shuffle(passages)
    chosen = passages[:limit]
    padded = [pad(chosen[i : i + size]) for i in range(0, len(chosen), size)]
    return [{"input_ids": ids, "attention_mask": real} for ids, real in padded]


def evaluate_rows(
    model: XLoraModel, tokenizer: Any, rows: Sequence[Row], *, window: int | None = None, limit: int | None = None
) -> Evaluation:
    """Evaluate a mixture on rows, grouped by the expert that they name (`other` if none).

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        rows: the text.
        window: tokens of a passage; None takes as many as the base model has positions, at most 1024.
        limit: the most passages of each group.

    Raises:
        DataError: text without a token to predict, or a window that is longer than the base model's positions.
    """
    return evaluate(model, _passages(model, tokenizer, rows, window, limit), progress=True)


def _passages(
    model: XLoraModel, tokenizer: Any, rows: Sequence[Row], window: int | None = None, limit: int | None = None
) -> list[Passage]:
    size = window_size(model.config, window)
    texts = ((row.as_text(tokenizer), row.expert or "other") for row in rows)
    return list(cut_passages(tokenizer, texts, window=size, limit=limit))


def run_expert_training(settings: ExpertSettings, *, resume: bool = True) -> Path:
    """Train one LoRA expert on some text.

    Args:
        settings: the run's settings.
        resume: continue from the last complete checkpoint in the output folder, if there is one.

    Returns:
        The expert's folder.

    Raises:
        LoramixError: what stops it.
    """
    checked = check_expert(settings)
    arguments, folder = checked.arguments, Path(settings.output)
    last = last_complete_checkpoint(arguments.output_dir) if resume else None
    set_seed(arguments.seed)
    model = get_peft_model(load_base(settings.base, settings.revision, checked.dtype), checked.config)
    tokenizer = with_padding(checked.tokenizer)
    trainer = build_trainer(model, arguments, tokenizer, checked.rows, (), callback=FiniteGradients())
    if not resume and trainer.is_world_process_zero():
        remove_checkpoints(Path(arguments.output_dir))
    if last is not None and is_finished(last, arguments):
        load_trained(model, last, best=False)
        if trainer.is_world_process_zero():
            model.save_pretrained(folder)
        return folder
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(folder))
    return folder


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer; its end token pads if it has no padding token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
