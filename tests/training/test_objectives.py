"""The objectives reach the gradients of the router under every trainer, and nothing else changes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from loramix import (
    ConfigurationError,
    PeftModel,
    TrainingError,
    UnsupportedOperationError,
    XLoraConfig,
    get_peft_model,
)
from loramix._compat import enable_checkpointing
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import attach, state_of
from loramix.training import ExpertLabels, RouterCallback, RouterObjectives
from loramix.training.objectives import RouterObjective
from support.tiny import ARCHITECTURES, llama, tokens
from support.versions import needs_transformers

OBJECTIVES = {
    "z_loss": RouterObjectives(z_loss=0.5),
    "load_balance": RouterObjectives(load_balance=0.5),
    "entropy_floor": RouterObjectives(entropy_floor=5.0, least_entropy=1.0),
    "supervised": RouterObjectives(supervised=0.5),
}
IDS = torch.tensor([0, 2])
WITHOUT_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def mixture(experts: Any, architecture: str = "llama", **config: Any) -> Any:
    base = ARCHITECTURES[architecture](**WITHOUT_DROPOUT.get(architecture, {}))
    torch.manual_seed(1)
    settings = {"hidden_size": 64, "adapters": experts(architecture), "layerwise_scalings": True, **config}
    return get_peft_model(base, XLoraConfig(**settings))


def router_gradient(model: Any, **inputs: Any) -> Tensor:
    model.zero_grad()
    model(tokens(), labels=tokens(), **inputs).loss.backward()
    return model.internal_xlora_classifier.layers[0].weight.grad.clone()


def hooked(model: Any, objectives: RouterObjectives, scale: float = 1.0) -> RouterObjective:
    hook = RouterObjective(objectives, scale)
    attach(model, hook)
    return hook


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_is_the_sum_of_both(objective: str, architecture: str, experts: Any) -> None:
    """The objective's own, by autograd on the logits alone, and that of the model's loss."""
    model = mixture(experts, architecture).train()
    plain = router_gradient(model, expert_ids=IDS)
    hook = hooked(model, OBJECTIVES[objective])
    found: list[Tensor] = []
    output = hook.routed

    def alone(what: Any) -> Tensor | None:
        loss = output(what)
        assert loss is not None
        weight = model.internal_xlora_classifier.layers[0].weight
        found.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
        return loss

    hook.routed = alone  # type: ignore[method-assign]
    both = router_gradient(model, expert_ids=IDS)
    assert found[0].abs().max() > 1e-4
    assert_close(both, plain + found[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpointed_gradients_are_the_same(objective: str, experts: Any) -> None:
    model = mixture(experts).train()
    hooked(model, OBJECTIVES[objective])
    expected = router_gradient(model, expert_ids=IDS)
    enable_checkpointing(model)
    assert_close(router_gradient(model, expert_ids=IDS), expected)


def test_evaluation_is_left_alone(experts: Any) -> None:
    model = mixture(experts)
    hook = hooked(model, RouterObjectives(z_loss=1.0))
    assert torch.equal(model(tokens()).logits, mixture(experts)(tokens()).logits)
    assert hook.take() == {}


def test_a_hook_comes_off_and_copies_are_without_it(experts: Any) -> None:
    model = mixture(experts)

    class Shift(RoutingHook):
        def logits(self, logits: Tensor, training: bool) -> Tensor:
            return logits + torch.tensor([9.0, 0.0, 0.0])

    plain = model(tokens()).logits
    detach = attach(model, Shift())
    shifted = model(tokens()).logits
    assert not torch.equal(shifted, plain)
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, plain)
    detach()
    assert torch.equal(model(tokens()).logits, plain)
    with pytest.raises(UnsupportedOperationError, match="makes scalings"):
        attach(llama(), Shift())


def rows(count: int = 8) -> list[dict[str, Any]]:
    ids = tokens(count, 8, seed=5)
    return [{"input_ids": row, "labels": row, "expert_ids": i % 3} for i, row in enumerate(ids)]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }


def trained(model: Any, folder: Path, objectives: RouterObjectives | None, **changes: Any) -> tuple[Tensor, list[Any]]:
    callbacks = [] if objectives is None else [RouterCallback(objectives)]
    torch.manual_seed(0)
    runner = Trainer(
        model, TrainingArguments(**arguments(folder, **changes)), train_dataset=rows(), callbacks=callbacks
    )
    runner.train()
    return model.internal_xlora_classifier.layers[0].weight.detach().clone(), runner.state.log_history


@pytest.fixture(scope="module")
def plainly(experts: Any, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The router's weight after a training without objectives."""
    return trained(mixture(experts), tmp_path_factory.mktemp("plain"), None)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_stock_trainer_trains_for_it_and_logs_it(
    objective: str, plainly: Tensor, experts: Any, tmp_path: Path
) -> None:
    other, history = trained(mixture(experts), tmp_path, OBJECTIVES[objective])
    assert not torch.allclose(plainly, other, atol=1e-4)
    logged = [entry for entry in history if "loss" in entry]
    assert all(f"router/{objective}" in entry and "router/load_cv" in entry for entry in logged)
    if objective in ("z_loss", "supervised"):  # the others start at their best
        assert logged[-1][f"router/{objective}"] < logged[0][f"router/{objective}"]


def test_accumulated_batches_give_the_gradient_of_the_whole_one(experts: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    whole, _ = trained(mixture(experts), tmp_path, OBJECTIVES["z_loss"], per_device_train_batch_size=8, **settings)
    parts, _ = trained(
        mixture(experts),
        tmp_path,
        OBJECTIVES["z_loss"],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **settings,
    )
    start = mixture(experts).internal_xlora_classifier.layers[0].weight
    assert (whole - start).abs().max() > 1e-3
    assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_the_temperature_follows_its_schedule_and_is_kept(experts: Any, tmp_path: Path) -> None:
    aims = RouterObjectives(temperature=(4.0, 0.25))
    assert [aims.temperature_at(t) for t in (0, 0.5, 1, 2)] == pytest.approx([4, 1, 0.25, 0.25])
    assert RouterObjectives().temperature_at(0.5) is None
    model = mixture(experts)
    trained(model, tmp_path, aims)
    assert model.peft_config["default"].softmax_temperature == pytest.approx(0.25)


def test_the_last_and_shorter_step_of_an_epoch_counts_as_much(experts: Any, tmp_path: Path) -> None:
    """Three texts: a step of two batches, then a step of one; a loss of 1 for each batch."""

    class One(RouterObjective):
        def _terms(self, output: RouterOutput, real: Tensor | None) -> dict[str, tuple[float, Tensor]]:
            seen.append(self.scale)
            return super()._terms(output, real)

    seen: list[float] = []
    settings = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    callback = RouterCallback(OBJECTIVES["z_loss"])
    runner = Trainer(
        mixture(experts),
        TrainingArguments(**arguments(tmp_path, **settings)),
        train_dataset=rows(3),
        callbacks=[callback],
    )
    callback.first_of(runner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loramix.training.objectives.RouterObjective", One)
        runner.train()
    assert seen == [0.5, 0.5, 1.0]


def test_the_best_model_comes_with_its_temperature(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts)
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"metric_for_best_model": "eval_loss"}
    runner = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, load_best_model_at_end=True, greater_is_better=True, **settings)),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[RouterCallback(RouterObjectives(temperature=(8.0, 1.0)))],
    )
    runner.train()
    best = Path(runner.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    saved: Any = PeftModel.from_pretrained(llama(), best)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, saved(tokens()).logits)


def test_a_loss_scaler_is_refused(experts: Any, tmp_path: Path) -> None:
    callback, settings = RouterCallback(OBJECTIVES["z_loss"]), TrainingArguments(**arguments(tmp_path))
    settings.fp16 = True
    with pytest.raises(ConfigurationError, match="bf16=True"):
        callback.on_train_begin(settings, None, None, model=mixture(experts))
    RouterCallback().on_train_begin(settings, None, None, model=mixture(experts))


def test_a_training_that_was_interrupted_leaves_nothing_to_the_next(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts)

    class Interrupt(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    settings = TrainingArguments(**arguments(tmp_path))
    callbacks = [RouterCallback(OBJECTIVES["z_loss"]), Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, settings, train_dataset=rows(), callbacks=callbacks).train()
    assert len(state_of(model).hooks) == 1
    RouterCallback(OBJECTIVES["z_loss"]).on_train_begin(settings, None, None, model=model)
    assert len(state_of(model).hooks) == 1
    trained(model, tmp_path, OBJECTIVES["z_loss"])
    assert state_of(model).hooks == ()


def test_labels_that_are_no_experts_are_refused(experts: Any) -> None:
    model = mixture(experts).train()
    hooked(model, RouterObjectives(supervised=1.0))
    for wrong in (-5, 3):
        with pytest.raises(ConfigurationError, match=f"{wrong} with 3 experts"):
            model(tokens(), labels=tokens(), expert_ids=torch.tensor([0, wrong]))


def test_the_callback_leaves_the_model_without_hooks(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts)
    trained(model, tmp_path, OBJECTIVES["z_loss"])
    assert state_of(model).hooks == ()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
def test_trls_sft_trainer_trains_for_it(experts: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    def run(objectives: RouterObjectives | None) -> Tensor:
        model = mixture(experts)
        plain = [
            {"input_ids": r["input_ids"].tolist(), "expert": ("math", "code", None)[r["expert_ids"]]} for r in rows()
        ]
        runner = SFTTrainer(
            model,
            SFTConfig(**arguments(tmp_path, remove_unused_columns=False, max_length=None, bf16=False)),
            train_dataset=datasets.Dataset.from_list(plain),
            processing_class=tokenizer(),
            data_collator=ExpertLabels(DataCollatorForLanguageModeling(pad_token_id=0), model.expert_names),
            callbacks=[] if objectives is None else [RouterCallback(objectives)],
        )
        runner.train()
        if objectives is not None:
            assert "router/supervised" in runner.state.log_history[0]
        return model.internal_xlora_classifier.layers[0].weight.detach()

    assert not torch.allclose(run(None), run(OBJECTIVES["supervised"]), atol=1e-4)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(96)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), eos_token="w1", pad_token="w0"
    )


def test_gradients_that_are_no_numbers_stop_the_training_before_the_weights(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts)

    class Poison(RoutingHook):
        count = 0

        def routed(self, output: Any) -> Tensor | None:
            self.count += 1
            return output.logits.sum() * (math.nan if self.count == 3 else 0.0)

    attach(model, Poison())
    with pytest.raises(TrainingError, match="step 3") as caught:
        trained(model, tmp_path, RouterObjectives(), save_strategy="steps", save_steps=1)
    assert str(tmp_path) in caught.value.remedy
    assert torch.isfinite(model.internal_xlora_classifier.layers[0].weight).all()
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").is_file()


@needs_transformers(5, 8, "the trainer reads its rows in random order only")
def test_a_batch_of_only_padding_teaches_nothing_and_stops_nothing(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens(3, 8)]
    rows = [row | {"expert_ids": torch.tensor(number)} for number, row in enumerate(rows)]
    rows[1] |= {"labels": torch.full((8,), -100), "attention_mask": torch.zeros(8, dtype=torch.long)}
    settings = arguments(tmp_path, per_device_train_batch_size=1, train_sampling_strategy="sequential")
    callback = RouterCallback(RouterObjectives(z_loss=1.0, load_balance=1.0, entropy_floor=1.0, supervised=1.0))
    trainer = Trainer(model, TrainingArguments(**settings), train_dataset=rows, callbacks=[callback])
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(step["loss"] > 0, step["grad_norm"] > 0) for step in steps] == [(True, True), (False, False), (True, True)]
    assert ["router/load_cv" in step for step in steps] == [True, False, True]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "wrong",
    [
        {"z_loss": -1.0},
        {"load_balance": math.nan},
        {"least_entropy": 1.5},
        {"temperature": (0.0, 1.0)},
        {"supervised": "1"},
    ],
)
def test_objectives_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        RouterObjectives(**wrong)


def test_labels_of_packed_texts_are_refused(experts: Any) -> None:
    model = mixture(experts).train()
    hooked(model, RouterObjectives(supervised=1.0))
    with pytest.raises(ConfigurationError, match="do not pack"):
        model(tokens(), labels=tokens(), expert_ids=torch.tensor([0, 1, 2]))


def test_tensorboard_is_shown_what_the_routing_does(experts: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = RouterCallback(RouterObjectives(z_loss=0.1))
    settings = TrainingArguments(**arguments(tmp_path, report_to="tensorboard"))
    runner = Trainer(mixture(experts), settings, train_dataset=rows(), callbacks=[callback])
    callback.first_of(runner)
    runner.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    names = ("load_cv", "importance_cv", "max_violation", "dead_share", "entropy_of_mean", "mean_entropy")
    for name in (*names, "information", "effective_experts", "z_loss"):
        steps = events.Scalars(f"train/router/{name}")
        assert [entry.step for entry in steps] == [1, 2, 3]
