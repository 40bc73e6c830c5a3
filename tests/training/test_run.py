"""Whole runs, from files to a mixture: checked before they start, resumed when they were killed."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loramix import (
    AdapterMismatchError,
    CheckpointNotFoundError,
    ConfigurationError,
    DataError,
    LoraConfig,
    PeftModel,
    XLoraModel,
)
from loramix._compat import is_checkpointing
from loramix.errors import LoramixError, SaveError, TrainingError
from loramix.layers.linear import LinearStack
from loramix.training import run as runs
from loramix.training.check import check
from loramix.training.checkpoints import last_complete_checkpoint
from loramix.training.run import run_expert_training, run_training
from loramix.training.settings import Data, ExpertSettings, TrainSettings
from support.peft_side import PEFT_WARNINGS
from support.tiny import llama, save_expert
from support.training_files import Files, write_lines

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")


def settings(files: Files, output: Path, **changes: Any) -> TrainSettings:
    return TrainSettings.from_dict(files.settings(output, **changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing interrupted, for tests to compare with and to copy."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run_training(settings(files, output))
    return output


@pytest.fixture(scope="module")
def start(files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The router as a run with this seed begins."""
    output = tmp_path_factory.mktemp("start")
    run_training(settings(files, output, trainer={"max_steps": 1, "learning_rate": 0.0}))
    return weights(output / "mixture")


def test_a_run_leaves_a_mixture_its_checkpoints_and_its_evaluation(files: Files, tmp_path: Path) -> None:
    done = run_training(
        settings(
            files, tmp_path, data={"train": str(files.data), "eval": str(files.held_out)}, objectives={"z_loss": 0.1}
        )
    )
    model, evaluation = done.model, done.evaluation
    assert done.folder == tmp_path / "mixture"
    assert evaluation is not None
    assert set(evaluation.groups) == {"math", "code", "prose"}
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(evaluation.to_dict()))
    base = AutoModelForCausalLM.from_pretrained(files.base)
    for folder in (tmp_path / "mixture", tmp_path / "checkpoint-4"):
        loaded = PeftModel.from_pretrained(base, folder)
        assert isinstance(loaded, XLoraModel)
        ids = torch.arange(4, 20).unsqueeze(0)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
        assert loaded.peft_config["default"].base_model_name_or_path == str(files.base)
        loaded.unload()
    assert not same(tmp_path / "checkpoint-2", tmp_path / "checkpoint-4")


def test_a_resumed_run_equals_the_uninterrupted_one(whole: Path, files: Files, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    broken = tmp_path / "part" / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-4", broken)
    (broken / "trainer_state.json").write_text("{")
    assert last_complete_checkpoint(tmp_path / "part") == tmp_path / "part" / "checkpoint-2"
    run_training(settings(files, tmp_path / "part"))
    assert same(whole / "mixture", tmp_path / "part" / "mixture")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_finished_run_that_is_started_again_stays_as_it_is(files: Files, tmp_path: Path) -> None:
    """Also where it was killed between its last checkpoint and the end."""
    for trainer in ({"lr_scheduler_type": "constant"}, {"num_train_epochs": 1, "max_steps": -1}):
        chosen = settings(files, tmp_path / str(len(trainer)), trainer=trainer)
        output = run_training(chosen).folder.parent
        shutil.copytree(output / "mixture", output / "first")
        steps = last_complete_checkpoint(output)
        shutil.rmtree(output / "mixture")
        run_training(chosen)
        assert same(output / "mixture", output / "first")
        assert last_complete_checkpoint(output) == steps
        longer = settings(files, output, trainer=trainer | {"max_steps": 8})
        with pytest.warns(UserWarning, match="max_steps"):
            run_training(longer)
        assert not same(output / "mixture", output / "first")


def test_a_run_starts_and_trains_a_router_of_evidence(files: Files, tmp_path: Path) -> None:
    run_training(settings(files, tmp_path, mixture={"router": "evidence"}))
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path / "mixture")
    assert loaded.router.kind == "evidence"
    assert loaded.router.weight.abs().max() > 0
    assert float(loaded.router.memory) != pytest.approx(math.log(9), abs=1e-7)


def test_the_best_mixture_is_the_one_that_is_kept(files: Files, tmp_path: Path) -> None:
    trainer = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the worst one is not the last
    data = {"train": str(files.data), "eval": str(files.held_out)}
    run_training(settings(files, tmp_path, data=data, trainer=trainer))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name != "checkpoint-4"
    (start,) = json.loads((tmp_path / "start" / "metric.json").read_text()).values()
    best = tmp_path / "start" if start >= state["best_metric"] else Path(state["best_model_checkpoint"])
    assert same(best, tmp_path / "mixture")
    run_training(settings(files, tmp_path, data=data, trainer=trainer))  # it is finished: the same again
    assert same(best, tmp_path / "mixture")


@pytest.mark.parametrize("killed", [False, True])
def test_a_training_that_only_makes_the_router_worse_ends_with_its_start(
    killed: bool, files: Files, tmp_path: Path
) -> None:
    chosen = settings(
        files,
        tmp_path,
        data={"train": str(files.data), "eval": str(files.held_out)},
        init={"method": "zeros"},
        objectives={"temperature": [1.0, 0.9]},
        trainer={"metric_for_best_model": "eval_loss", "greater_is_better": True},  # each step makes it smaller
    )
    done = run_training(chosen)
    if killed:  # after its second step, and started again
        shutil.rmtree(tmp_path / "mixture")
        shutil.rmtree(tmp_path / "checkpoint-4")
        done = run_training(chosen)
    assert same(tmp_path / "start", tmp_path / "mixture")
    assert not same(tmp_path / "checkpoint-4", tmp_path / "mixture")
    assert done.model.active_peft_config.softmax_temperature == 1.0
    assert done.evaluation is not None


def test_a_training_that_helps_ends_with_the_best_checkpoint(files: Files, tmp_path: Path) -> None:
    data = {"train": str(files.data), "eval": str(files.held_out)}
    run_training(settings(files, tmp_path, data=data, init={"method": "zeros"}))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    (start,) = json.loads((tmp_path / "start" / "metric.json").read_text()).values()
    assert state["best_metric"] < start
    assert same(Path(state["best_model_checkpoint"]), tmp_path / "mixture")


def test_a_run_that_goes_on_with_other_settings_says_so(files: Files, tmp_path: Path) -> None:
    run_training(settings(files, tmp_path, trainer={"max_steps": 2}))
    with pytest.warns(UserWarning, match=r"objectives.z_loss: None, now 1.0; trainer.max_steps: 2, now 4"):
        run_training(settings(files, tmp_path, objectives={"z_loss": 1.0}))
    with pytest.raises(ConfigurationError, match="xlora_depth: 1, now 2"):
        run_training(settings(files, tmp_path, mixture={"xlora_depth": 2}))
    run_training(settings(files, tmp_path, mixture={"xlora_depth": 2}), resume=False)


def test_what_trl_refuses_is_told(files: Files, tmp_path: Path) -> None:
    data = str(write_lines(tmp_path / "chat.jsonl", [{"messages": messages} for messages in CHAT]))
    with pytest.raises(ConfigurationError, match="SFTTrainer takes"):
        run_training(settings(files, tmp_path / "run", data=data, trainer={"assistant_only_loss": True}))


def test_an_expert_whose_loss_is_no_number_is_not_saved(files: Files, tmp_path: Path) -> None:
    wild = {"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 6, "disable_tqdm": True, "save_steps": 1}
    chosen = ExpertSettings(base=str(files.base), data=Data(str(files.data)), output=str(tmp_path / "x"), trainer=wild)
    with pytest.raises(TrainingError, match="the weights are those of step"):
        run_expert_training(chosen)
    assert not (tmp_path / "x" / "adapter_model.safetensors").exists()


def test_an_expert_that_is_trained_stays_as_it_is(files: Files, tmp_path: Path) -> None:
    short = {"max_steps": 2, "lr_scheduler_type": "constant", "disable_tqdm": True}
    chosen = ExpertSettings(base=str(files.base), data=Data(str(files.data)), output=str(tmp_path / "x"), trainer=short)
    run_expert_training(chosen)
    first = weights(tmp_path / "x")
    for file in (tmp_path / "x").glob("adapter_*"):
        file.unlink()
    run_expert_training(chosen)
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(tmp_path / "x").items())
    run_expert_training(chosen, resume=False)


def test_a_window_longer_than_the_positions_is_refused(whole: Path, files: Files) -> None:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files.base), whole / "mixture")
    with pytest.raises(DataError, match="128 positions"):
        runs.evaluate_rows(model, None, [], window=129)


def test_a_fresh_run_ignores_checkpoints(whole: Path, files: Files, tmp_path: Path) -> None:
    output = shutil.copytree(whole, tmp_path / "run")
    again = run_training(settings(files, output, trainer={"max_steps": 1}), resume=False)
    assert isinstance(again.model, XLoraModel)
    assert not same(whole / "mixture", output / "mixture")
    assert last_complete_checkpoint(output) == output / "checkpoint-1"


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_scaling_pass_may_be_kept(where: str, whole: Path, files: Files, tmp_path: Path) -> None:
    folder = {"cache_folder": str(tmp_path / "cache")} if where == "disk" else {}
    run_training(settings(files, tmp_path / "kept", cache="1MB", **folder))
    one, other = weights(whole / "mixture"), weights(tmp_path / "kept" / "mixture")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-3)


WITHOUT_A_LABEL = [{"text": text} for text in ("1 + 2 = 3", "def f(x)", "The method")]
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "labels of every expert": ("labels", {}),
    "prompts beside them": ("labels", {"init": {"prompts": True}}),
    "prompts": ("prompts", {"data": WITHOUT_A_LABEL, "init": {"prompts": True}}),
    "labels of one expert": ("zeros", {"data": [*WITHOUT_A_LABEL, {"text": "1 + 1", "expert": "math"}]}),
    "nothing": ("zeros", {"data": WITHOUT_A_LABEL}),
    "a router too narrow for a map": ("zeros", {"mixture": {"xlora_depth": 2, "xlora_size": 4}}),
    "a router of other parts": ("random", {"mixture": {"use_bias": False}}),
    "prototypes": ("labels", {"mixture": {"router": "prototypes"}}),
    "static": ("labels", {"mixture": {"router": "static"}}),
    "static without labels": (
        "zeros",
        {"data": WITHOUT_A_LABEL, "mixture": {"router": "static"}, "init": {"prompts": True}},
    ),
    "what is asked for": ("random", {"init": {"method": "random"}}),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_the_start_is_the_best_that_the_data_has_and_is_told(case: str, files: Files, tmp_path: Path) -> None:
    expected, changes = CHOSEN[case]
    if changes.get("init", {}).get("prompts"):
        (tmp_path / "p.json").write_text(json.dumps({"math": "1 + 2", "code": "def f", "prose": "The method"}))
        changes = changes | {"init": {"prompts": str(tmp_path / "p.json")}}
    if "data" in changes:
        changes = changes | {"data": str(write_lines(tmp_path / "data.jsonl", changes["data"]))}
    chosen, told = settings(files, tmp_path / "run", **changes, trainer={"max_steps": 1}), list[str]()
    assert check(chosen).plan.start == expected
    if case in ("nothing", "static", "prototypes", "what is asked for"):
        run_training(chosen, tell=told.append)
        assert len(told) == 1
        assert told[0].startswith(f"The router starts from {expected}: ")


def test_text_that_an_expert_never_predicts_best_makes_no_router(files: Files, tmp_path: Path) -> None:
    chosen = settings(files, tmp_path, init={"method": "text"})  # the experts are random
    with pytest.raises(DataError, match="no token for"):
        run_training(chosen)


@pytest.mark.parametrize("method", ["zeros", "prompts", "labels"])
def test_every_start(method: str, files: Files, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"math": "1 + 2 = 3", "code": "def f(x):", "prose": ["The method", "returns"]}))
    init = {"method": method} | ({"prompts": str(prompts)} if method == "prompts" else {})
    chosen = settings(files, tmp_path / "run", init=init, trainer={"max_steps": 1, "learning_rate": 0.0})
    model = run_training(chosen).model
    layer = model.internal_xlora_classifier.layers[0]
    assert bool(layer.weight.any()) == (method != "zeros")


CHAT = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}] for i in range(6)]
WORDS = [{"text": "some words " * (i + 1)} for i in range(6)]
FORMATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "chat": ([{"messages": messages} for messages in CHAT], {}),
    "completion only": (
        [{"prompt": f"{i} =", "completion": f" {i}"} for i in range(6)],
        {"completion_only_loss": True},
    ),
    "packed": (WORDS, {"packing": True, "max_length": 64}),
    "bfloat16 autocast": (WORDS, {"bf16": True}),
    "checkpointed": (WORDS, {"gradient_checkpointing": True}),
}


SHOWS: dict[str, Callable[[Any, Any], object]] = {
    "chat": lambda batch, _: bytes(batch["input_ids"][0][:4].tolist()) and (batch["labels"] != -100).sum() > 20,
    "completion only": lambda batch, _: (batch["labels"][0] != -100).sum().item() == 3,  # " 0" and the end
    "packed": lambda batch, _: len(batch["input_ids"]) == 1 and (batch["position_ids"] == 0).sum() == 2,
    "bfloat16 autocast": lambda _, seen: seen == {torch.bfloat16},
    "checkpointed": lambda batch, _: True,
}


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_trl_offers_reaches_the_model_and_trains(
    case: str, files: Files, start: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, trainer = FORMATS[case]
    data = str(write_lines(tmp_path / "data.jsonl", rows))
    built: list[Any] = []
    build, seen = runs.build_trainer, set[torch.dtype]()
    monkeypatch.setattr(runs, "build_trainer", lambda *a, **k: built.append(build(*a, **k)) or built[0])
    monkeypatch.setattr(LinearStack, "_gated", spied(LinearStack._gated, seen))
    done = run_training(settings(files, tmp_path / "run", data=data, trainer={"max_steps": 2, **trainer}))
    batch = next(iter(built[0].get_train_dataloader()))
    assert SHOWS[case](batch, seen)
    assert is_checkpointing(done.model) == (case == "checkpointed")
    found = weights(tmp_path / "run" / "mixture")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in found.items())


def spied(method: Any, seen: set[torch.dtype]) -> Any:
    def run(*args: Any) -> Any:
        out = method(*args)
        seen.add(out.dtype)
        return out

    return run


def test_experts_train_in_float32_beside_a_bfloat16_base(files: Files, tmp_path: Path) -> None:
    chosen = settings(files, tmp_path, dtype="bfloat16", mixture={"xlora_depth": 1, "use_trainable_adapters": True})
    model = run_training(chosen).model
    kinds = {(p.dtype, p.requires_grad) for p in model.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    moved = load_file(tmp_path / "mixture" / "math" / "adapter_model.safetensors")
    started = load_file(Path(files.experts["math"]) / "adapter_model.safetensors")
    assert any(not torch.equal(tensor.float(), started[name].float()) for name, tensor in moved.items())


def test_a_plan_counts_what_will_be_there(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "load_base", lambda *_: pytest.fail("weights were loaded"))
    plan = check(settings(files, tmp_path, trainer={"max_steps": -1, "num_train_epochs": 2})).plan
    base = AutoModelForCausalLM.from_pretrained(files.base)
    assert plan.base_parameters == base.num_parameters()
    assert plan.memory["base model"] == sum(p.nbytes for p in base.parameters())
    assert (plan.layers, plan.router_parameters) == (4, 65 * 3)
    assert (plan.rows, plan.labelled, plan.eval_rows, plan.steps) == (12, 12, 0, 12)
    assert plan.to_dict()["memory_total"] == sum(plan.memory.values())
    assert not list(tmp_path.iterdir())


def other_expert(files: Files, tmp_path: Path) -> dict[str, Any]:
    wide = save_expert(tmp_path / "wide", llama(intermediate_size=96), target_modules=["down_proj"])
    return {"experts": {**files.experts, "wide": wide}}


def big_tokenizer(files: Files, tmp_path: Path) -> dict[str, Any]:
    folder = shutil.copytree(files.base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    return {"base": str(folder)}


def unlabelled(files: Files, tmp_path: Path) -> dict[str, Any]:
    return {"data": str(write_lines(tmp_path / "u.jsonl", [{"text": "x"}])), "objectives": {"supervised": 1.0}}


def no_configuration(files: Files, tmp_path: Path) -> dict[str, Any]:
    folder = shutil.copytree(files.base, tmp_path / "base")
    (folder / "config.json").unlink()
    return {"base": str(folder)}


def blocked(files: Files, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "file").touch()
    return {"output": str(tmp_path / "file" / "run")}


def strangers(files: Files, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "p.json").write_text('{"law": "text"}')
    return {"init": {"method": "prompts", "prompts": str(tmp_path / "p.json")}}


REFUSED: dict[str, tuple[Any, type[Exception]]] = {
    "a base without a configuration": (no_configuration, LoramixError),
    "an output that cannot be": (blocked, SaveError),
    "a cache folder that cannot be": (
        lambda f, p: {"cache": "1MB", "cache_folder": blocked(f, p)["output"]},
        SaveError,
    ),
    "prompts of others": (strangers, DataError),
    "a router too narrow for its start": (
        lambda *_: {"init": {"method": "labels"}, "mixture": {"xlora_depth": 2, "xlora_size": 4}},
        ConfigurationError,
    ),
    "an evaluation without data": (lambda *_: {"trainer": {"eval_strategy": "steps"}}, ConfigurationError),
    "a number that is none": (lambda *_: {"trainer": {"max_steps": "ten"}}, ConfigurationError),
    "a batch that is none": (lambda *_: {"trainer": {"per_device_train_batch_size": True}}, ConfigurationError),
    "more tokens than positions": (lambda *_: {"trainer": {"max_length": 129}}, ConfigurationError),
    "too few tokens": (lambda *_: {"trainer": {"max_length": 1}}, ConfigurationError),
    "re-entrant checkpointing": (
        lambda *_: {
            "trainer": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        },
        ConfigurationError,
    ),
    "no base": (lambda *_: {"base": "./nowhere"}, CheckpointNotFoundError),
    "an expert of another base": (other_expert, AdapterMismatchError),
    "a missing expert": (lambda *_: {"experts": {"x": "./nowhere"}}, CheckpointNotFoundError),
    "missing data": (lambda *_: {"data": "./nowhere.jsonl"}, DataError),
    "missing evaluation data": (lambda f, _: {"data": {"train": str(f.data), "eval": "./nowhere"}}, DataError),
    "an expert that the data alone knows": (
        lambda f, _: {"experts": {"math": f.experts["math"]}},
        DataError,
    ),
    "a tokenizer that does not fit": (big_tokenizer, DataError),
    "labels that are not there": (unlabelled, DataError),
    "labels and packing": (
        lambda *_: {"objectives": {"supervised": 1.0}, "trainer": {"packing": True}},
        ConfigurationError,
    ),
    "a mixture that cannot be": (lambda *_: {"mixture": {"top_k_lora": 9}}, ConfigurationError),
    "a misspelt field of the mixture": (lambda *_: {"mixture": {"xlora_dept": 2}}, ConfigurationError),
    "a misspelt objective": (lambda *_: {"objectives": {"zloss": 2}}, ConfigurationError),
    "a misspelt argument": (lambda *_: {"trainer": {"max_step": 2}}, ConfigurationError),
    "an argument that cannot be": (lambda *_: {"trainer": {"lr_scheduler_type": "zigzag"}}, ConfigurationError),
    "another dtype": (lambda *_: {"dtype": "int3"}, ConfigurationError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_stop_a_run_stops_it_before_weights_load(
    case: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "load_base", lambda *_: pytest.fail("weights were loaded"))
    change, error = REFUSED[case]
    changes = change(files, tmp_path)
    chosen = settings(files, Path(changes.pop("output", tmp_path / "out")), **changes)
    with pytest.raises(error):
        run_training(chosen)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_an_expert_is_trained_and_peft_loads_it(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "expert"
    chosen = ExpertSettings(
        base=str(files.base),
        data=Data(str(files.data)),
        output=str(output),
        lora={"r": 3, "target_modules": ["q_proj"]},
        trainer={"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "disable_tqdm": True},
    )
    assert run_expert_training(chosen) == output
    config = LoraConfig.from_pretrained(output)
    assert (config.r, config.base_model_name_or_path) == (3, str(files.base))
    import peft

    base = AutoModelForCausalLM.from_pretrained(files.base)
    ids = torch.arange(4, 20).unsqueeze(0)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files.base), output)(ids).logits
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, output)(ids).logits, expected)
    assert not torch.equal(expected, AutoModelForCausalLM.from_pretrained(files.base)(ids).logits)


def test_a_full_disk_leaves_the_checkpoint_before(
    whole: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramix.files import tensors

    saved: list[Path] = []
    real = tensors.save_file

    def save(content: Any, path: Path, **options: Any) -> None:
        if len(saved) >= 6:  # the router, three experts, the trainer's file; then one of the next checkpoint
            raise OSError(28, "No space left on device")
        saved.append(path)
        real(content, path, **options)

    monkeypatch.setattr(tensors, "save_file", save)
    with pytest.raises(SaveError, match="No space left"):
        run_training(settings(files, tmp_path))
    monkeypatch.undo()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    run_training(settings(files, tmp_path))
    assert same(tmp_path / "mixture", whole / "mixture")


SCRIPT = """
import json, sys
import transformers
transformers.logging.set_verbosity_error()
from loramix.training.run import run_training
from loramix.training.settings import TrainSettings
run_training(TrainSettings.from_dict(json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(files: Files, tmp_path: Path) -> None:
    """SIGTERM after random times, most of them while it trains and saves; each start goes on from what is whole."""
    many = {"max_steps": 40, "save_steps": 1, "save_total_limit": 3}
    run_training(settings(files, tmp_path / "whole", trainer=many))
    content = json.dumps(files.settings(tmp_path / "killed", trainer=many))
    command = [sys.executable, "-c", SCRIPT, content]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    rng, kills = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        first = last_complete_checkpoint(tmp_path / "killed")
        while process.poll() is None and last_complete_checkpoint(tmp_path / "killed") == first:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            kills += 1
        process.wait()
    assert kills
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "killed" / "mixture", tmp_path / "whole" / "mixture")
