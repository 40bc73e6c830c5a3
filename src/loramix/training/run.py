"""A whole run: build, train with TRL's SFTTrainer, save, evaluate; `loramix.training.check` looks at all of it before.

What a run leaves in its output folder:

    checkpoint-<step>/      the trainer's, each a mixture that `PeftModel.from_pretrained` loads
    mixture/                the trained mixture
    evaluation.json         the figures of `loramix eval`, where there is data to evaluate with
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import set_seed

from loramix import checkpoint
from loramix.base_files import load_base
from loramix.errors import LoramixError
from loramix.model import XLoraModel, get_peft_model
from loramix.training.check import Checked, CheckedExpert, check, check_expert
from loramix.training.data import ExpertLabels, Row, to_dataset
from loramix.training.evaluation import Evaluation, cut, evaluate
from loramix.training.initialise import init_router
from loramix.training.objectives import RouterCallback
from loramix.training.recall import ScalingPassCache
from loramix.training.settings import ExpertSettings, TrainSettings


def run_training(settings: TrainSettings, *, resume: bool = True) -> tuple[XLoraModel, Evaluation | None]:
    """Train a router from files to a mixture.

    Args:
        settings: what to do.
        resume: go on from the last complete checkpoint in the output folder, where there is one.

    Returns:
        The trained mixture, and its evaluation where there is data for it and this is the main process.

    Raises:
        LoramixError: whatever stops it; checkpoints that were saved stay.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

    checked = check(settings)
    set_seed(checked.arguments.seed)
    model = get_peft_model(load_base(settings.base, settings.revision, checked.dtype), checked.config)
    _initialise(model, settings, checked)
    tokenizer, arguments = with_padding(checked.tokenizer), checked.arguments
    callback = RouterCallback(checked.objectives)
    packed = arguments.packing or arguments.padding_free
    collator = ExpertLabels(DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id), model.expert_names)
    trainer = SFTTrainer(
        cast(Any, model),
        arguments,
        train_dataset=to_dataset(checked.rows, tokenizer, arguments.max_length, labels=not packed),
        eval_dataset=to_dataset(checked.eval_rows, tokenizer, arguments.max_length) if checked.eval_rows else None,
        processing_class=tokenizer,
        data_collator=None if packed else cast(Any, collator),
        callbacks=[callback],
    )
    callback.first_of(trainer)
    last = last_complete_checkpoint(arguments.output_dir) if resume else None
    _train(model, trainer, settings, None if last is None else str(last))
    folder = Path(arguments.output_dir)
    trainer.save_model(str(folder / "mixture"))
    evaluation = None
    if checked.eval_rows and trainer.is_world_process_zero():
        evaluation = evaluate_rows(model, tokenizer, checked.eval_rows)
        (folder / "evaluation.json").write_text(json.dumps(evaluation.to_dict(), indent=2), encoding="utf-8")
    return model, evaluation


def _train(model: XLoraModel, trainer: Any, settings: TrainSettings, checkpoint_folder: str | None) -> None:
    size = settings.cache_bytes
    if size is None:
        trainer.train(resume_from_checkpoint=checkpoint_folder)
        return
    with ScalingPassCache(model, max_bytes=size, folder=settings.cache_folder):
        trainer.train(resume_from_checkpoint=checkpoint_folder)


def _initialise(model: XLoraModel, settings: TrainSettings, checked: Checked) -> None:
    method = settings.init.get("method")
    if method == "prompts":
        init_router(model, "prompts", tokenizer=checked.tokenizer, prompts=checked.prompts)
    elif method == "labels":
        init_router(
            model, "labels", batches=list(labelled_batches(checked.rows, checked.tokenizer, model.expert_names))
        )
    elif method == "zeros":
        init_router(model, "zeros")


def labelled_batches(
    rows: Sequence[Row], tokenizer: Any, experts: Sequence[str], *, window: int = 512
) -> list[Mapping[str, torch.Tensor]]:
    """The rows that name their expert, each as a batch for `init_router(model, "labels", batches=…)`."""
    batches: list[Mapping[str, torch.Tensor]] = []
    for row in rows:
        if row.expert is not None:
            ids = tokenizer(row.as_text(tokenizer), verbose=False)["input_ids"][:window]
            number = torch.tensor([experts.index(row.expert)])
            batches.append({"input_ids": torch.tensor([ids]), "expert_ids": number})
    return batches


def evaluate_rows(
    model: XLoraModel, tokenizer: Any, rows: Sequence[Row], *, window: int | None = None, limit: int | None = None
) -> Evaluation:
    """Evaluate a mixture on rows, in groups by the expert that they name (`other` where they name none).

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        rows: the text.
        window: tokens of a passage; as many as the base model has positions, at most 1024, when None.
        limit: at most so many passages of each group.
    """
    positions = getattr(cast(Any, model).config.get_text_config(), "max_position_embeddings", 1024)
    texts = ((row.as_text(tokenizer), row.expert or "other") for row in rows)
    return evaluate(model, cut(tokenizer, texts, window=window or min(1024, positions), limit=limit))


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the most steps that was written whole: its trainer state, which is written last, is readable.

    A training that was killed while it saved leaves a folder that is not, and goes on from the one before.
    """
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _is_complete(path)
    ]
    return max(found)[1] if found else None


def _is_complete(path: Path) -> bool:
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        checkpoint.detect(path)
    except (OSError, ValueError, LoramixError):
        return False
    return isinstance(state, dict)


def run_expert_training(settings: ExpertSettings, *, resume: bool = True) -> Path:
    """Train one LoRA expert on some text.

    Args:
        settings: what to do.
        resume: go on from the last complete checkpoint in the output folder, where there is one.

    Returns:
        The expert's folder.

    Raises:
        LoramixError: whatever stops it.
    """
    from trl.trainer.sft_trainer import SFTTrainer

    checked: CheckedExpert = check_expert(settings)
    arguments = checked.arguments
    set_seed(arguments.seed)
    model = get_peft_model(load_base(settings.base, settings.revision, checked.dtype), checked.config)
    tokenizer = with_padding(checked.tokenizer)
    rows = to_dataset(checked.rows, tokenizer, arguments.max_length)
    trainer = SFTTrainer(cast(Any, model), arguments, train_dataset=rows, processing_class=tokenizer)
    last = last_complete_checkpoint(arguments.output_dir) if resume else None
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    folder = Path(settings.output)
    trainer.save_model(str(folder))
    return folder


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer, which pads with its end token where it has no other."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
