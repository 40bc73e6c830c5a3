"""The stock Trainer trains the router, saves mixtures, resumes, and finds its best model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from loramix import LoraConfig, PeftModel, XLoraModel, get_peft_model
from support.mixtures import logits_of
from support.tiny import llama, tokens
from support.usages import Adapters, build
from support.versions import needs_transformers

STEPS = 6


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twelve rows of random tokens, that a router can learn by heart a little."""

    def __init__(self) -> None:
        self.rows = tokens(12, 10, seed=3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(model: Any, folder: Path, **changes: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    texts = Texts()
    return Trainer(
        model=model, args=TrainingArguments(**{**arguments, **changes}), train_dataset=texts, eval_dataset=texts
    )


def copied(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def losses(runner: Trainer) -> Sequence[float]:
    return [entry["loss"] for entry in runner.state.log_history if "loss" in entry]


@pytest.mark.parametrize("experts_train", [False, True], ids=["router", "router and experts"])
def test_training_saves_mixtures_and_resumes_as_if_it_had_not_stopped(
    experts_train: bool, adapters: Adapters, tmp_path: Path
) -> None:
    model = build(adapters, "basic", use_trainable_adapters=experts_train)
    before = copied(model)
    runner = trainer(model, tmp_path / "whole")
    runner.train()
    after = copied(model)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".lora_A" in name for name in changed) == experts_train
    assert losses(runner)[-1] < losses(runner)[0]

    model.eval()
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path / "whole" / f"checkpoint-{STEPS}")
    assert isinstance(loaded, XLoraModel)
    assert torch.equal(logits_of(loaded), logits_of(model))

    fresh = build(adapters, "basic", use_trainable_adapters=experts_train)
    resumed = trainer(fresh, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert {name: torch.equal(tensor, after[name]) for name, tensor in copied(fresh).items()} == dict.fromkeys(
        after, True
    )
    assert losses(resumed)[3:] == losses(runner)[3:]


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # transformers before 5.8, of the file system
def test_the_best_model_is_loaded_at_the_end(adapters: Adapters, tmp_path: Path) -> None:
    model = build(adapters)
    runner = trainer(
        model,
        tmp_path,
        max_steps=4,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_total_limit=4,
    )
    runner.train()
    best = Path(runner.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    model.eval()
    assert torch.equal(logits_of(model), logits_of(PeftModel.from_pretrained(llama(), best)))
    assert not torch.equal(logits_of(model), logits_of(PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-4")))


@needs_transformers(5, 17, "the trainer divides a loss of evaluation by labels that are not predicted")
def test_evaluation_predicts_logits_only(adapters: Adapters, tmp_path: Path) -> None:
    model = build(adapters)
    found = trainer(model, tmp_path).predict(Texts())
    assert found.predictions.shape == (12, 10, 96)
    with torch.no_grad():
        expected = model(Texts().rows, labels=Texts().rows).loss.item()
    assert found.metrics["test_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_new_expert_is_trained_and_joins_a_mixture(adapters: Adapters, tmp_path: Path) -> None:
    model: Any = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    before = logits_of(model)
    runner = trainer(model, tmp_path)
    runner.train()
    assert losses(runner)[-1] < losses(runner)[0]
    model.eval()
    assert torch.equal(before, logits_of(llama()))
    runner.save_model(str(tmp_path / "new"))
    folders = {**adapters(1), "new": str(tmp_path / "new")}
    mixture = build(lambda _: folders)
    with mixture.fixed_scalings([0.0, 1.0]):
        assert_close(logits_of(mixture), logits_of(model))
