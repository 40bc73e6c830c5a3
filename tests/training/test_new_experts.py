"""Runs that make new experts: from YAML to a mixture, balanced by default, with dead experts told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from loramix import ConfigurationError, DataError, LoraConfig, PeftModel, XLoraConfig, get_peft_model
from loramix.analysis.metrics import RoutingMetrics
from loramix.errors import LoramixError
from loramix.training import RouterCallback, RouterObjectives
from loramix.training import run as runs
from loramix.training.check import check
from loramix.training.objectives import LOAD_BALANCE
from loramix.training.run import run_training
from loramix.training.settings import TrainSettings, expert_places
from support.mixtures import SPARSE
from support.tiny import llama, tokens
from support.training_files import Files

NEW = {"new": 2, "r": 3, "target_modules": ["q_proj"]}


def settings(files: Files, output: Path, experts: Any = NEW, **changes: Any) -> TrainSettings:
    return TrainSettings.from_dict({**files.settings(output, **changes), "experts": experts})


def tensors(folder: Path, names: Any = ("e0", "e1", ".")) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": tensor
        for name in names
        for key, tensor in load_file(folder / name / "adapter_model.safetensors").items()
    }


def same(one: Path, other: Path, names: Any = ("e0", "e1", ".")) -> bool:
    a, b = tensors(one, names), tensors(other, names)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "existing": ({"math": "m", "r": "an expert"}, {"math": "m", "r": "an expert"}),
    "new by name": ({"law": {"r": 8}, "math": "m", "bio": {}}, {"law": {"r": 8}, "math": "m", "bio": {}}),
    "a number of new ones": ({"new": 2, "r": 4}, {"e0": {"r": 4}, "e1": {"r": 4}}),
    "beside existing ones": (
        {"math": "m", "new": 2, "code": "c", "lora_alpha": 8},
        {"math": "m", "e0": {"lora_alpha": 8}, "e1": {"lora_alpha": 8}, "code": "c"},
    ),
    "beside new ones by name": ({"law": {"r": 2}, "new": 1, "r": 4}, {"law": {"r": 2}, "e0": {"r": 4}}),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_experts_of_a_run(case: str) -> None:
    given, expected = PLACES[case]
    found = expert_places(given)
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ({"new": "path"}, "needs another"),
        ({"new": 0}, "at least 1"),
        ({"new": True}, "whole number"),
        ({"new": {"r": 8}}, "whole number"),
        ({"new": 2, "e1": "path"}, "Rename"),
        ({"e1": "path", "new": 2}, "Rename"),
        ({"r": 8}, "new: 8"),
        ({"math": 3.5}, "math=3.5"),
        ({"new": 2, "rank": 8}, "rank=8"),
        ({"law": {"rank": 8}}, "experts.law"),
        ({"new": 2, "revision": "main"}, "revision"),
    ],
)
def test_experts_that_could_mean_two_things_or_none(experts: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        expert_places(experts)
    assert said in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a rank of 0": ({"new": 2, "r": 0}, {}, "r=0"),
    "modules that are not there": ({"new": 2, "target_modules": ["nowhere"]}, {}, "'e0'.*nowhere"),
    "a dropout above 1": ({"new": 2, "lora_dropout": 2}, {}, "lora_dropout"),
    "a path where a field is meant": ({"new": 2, "bias": "some/path"}, {}, "bias"),
    "a start from text": (NEW, {"init": {"method": "text"}}, "new experts"),
    "a start from labels": (NEW, {"init": {"method": "labels"}}, "expert"),
    "a router of the experts": (NEW, {"mixture": {"router": "arrow"}}, "do not train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_stop_a_run_stops_it_before_weights_load(
    case: str, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "load_base", lambda *_: pytest.fail("weights were loaded"))
    experts, changes, said = REFUSED[case]
    with pytest.raises(LoramixError, match=said):
        run_training(settings(files, tmp_path / "out", experts, data=texts(tmp_path), **changes))


def texts(folder: Path, first: int = 0) -> str:
    path = folder / f"text-{first}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{first + i} and some words more"}) + "\n" for i in range(8)))
    return str(path)


def test_a_plan_counts_the_new_experts(files: Files, tmp_path: Path) -> None:
    plan = check(settings(files, tmp_path / "out", {**files.experts, **NEW}, data=texts(tmp_path))).plan
    assert (plan.experts, plan.new_experts) == (["math", "code", "prose", "e0", "e1"], ["e0", "e1"])
    of_new = 2 * 2 * 3 * (64 + 64)  # experts, layers, rank
    old = check(settings(files, tmp_path / "out", files.experts, data=texts(tmp_path))).plan
    assert plan.memory["experts"] == old.memory["experts"] + 16 * of_new


@pytest.mark.parametrize("router", ["classifier", "linear"])
def test_a_run_trains_new_experts_and_resumes_as_if_it_had_not_stopped(
    router: str, files: Files, tmp_path: Path
) -> None:
    mixture = {} if router == "classifier" else {"router": router}
    experts, told = {"math": files.experts["math"], **NEW}, list[str]()
    chosen = settings(files, tmp_path / "whole", experts, data=texts(tmp_path), mixture=mixture)
    done = run_training(chosen, tell=told.append)
    assert "New experts train with it: e0, e1; objectives.load_balance: 0.01." in told
    assert done.model.expert_names == ["math", "e0", "e1"]
    whole = tmp_path / "whole"
    assert all(tensor.any() for tensor in tensors(whole / "mixture", ["e0", "e1"]).values())
    started = load_file(Path(files.experts["math"]) / "adapter_model.safetensors")
    kept = load_file(whole / "mixture" / "math" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, started[name]) for name, tensor in kept.items())
    shutil.copytree(whole / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    run_training(settings(files, tmp_path / "part", experts, data=texts(tmp_path), mixture=mixture))
    assert same(whole / "mixture", tmp_path / "part" / "mixture")
    assert not same(whole / "mixture", whole / "checkpoint-2")
    with pytest.raises(ConfigurationError, match=r"experts.new: 2, now 3"):
        run_training(settings(files, whole, {**experts, "new": 3}, data=texts(tmp_path), mixture=mixture))


def test_a_training_that_only_makes_the_mixture_worse_ends_with_its_start(files: Files, tmp_path: Path) -> None:
    data = {"train": texts(tmp_path), "eval": texts(tmp_path, first=100)}
    worse = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # each step makes it smaller
    run_training(settings(files, tmp_path / "run", data=data, trainer=worse))
    mixture = tmp_path / "run" / "mixture"
    assert same(tmp_path / "run" / "start", mixture)
    assert not any(tensor.any() for key, tensor in tensors(mixture).items() if "lora_B" in key)
    assert not same(tmp_path / "run" / "checkpoint-4", mixture)


def test_load_balance_is_on_where_experts_are_new_and_can_be_left_out(files: Files, tmp_path: Path) -> None:
    def weight(experts: Any = NEW, **changes: Any) -> float:
        chosen = settings(files, tmp_path / "out", experts, data=texts(tmp_path), **changes)
        return check(chosen).objectives.load_balance

    assert weight() == weight({**files.experts, **NEW}) == LOAD_BALANCE
    assert weight(objectives={"load_balance": 0.0}) == 0.0
    assert weight(objectives={"load_balance": 0.5, "z_loss": 0.1}) == 0.5
    assert weight(trainer={"fp16": True}) == 0.0  # no objective goes with a loss scaler
    assert weight(dict(files.experts)) == 0.0


def test_without_an_alpha_new_experts_begin_as_one_of_their_total_rank_would(files: Files, tmp_path: Path) -> None:
    def alpha(experts: Any, mixture: Any) -> float:
        chosen = settings(files, tmp_path / "out", experts, data=texts(tmp_path), mixture=mixture)
        return check(chosen).config.new_experts["e0"].lora_alpha

    four = {"new": 4, "r": 9}
    assert alpha(four, {}) == alpha(four, {"router": "linear"}) == 2 * 9 * 4
    assert alpha({"math": files.experts["math"], **four}, {}) == 2 * 9 * 5
    assert alpha(four, SPARSE) == 2 * 9 * 2
    assert alpha(four, {"top_k_lora": 2}) == 2 * 9 * 4
    assert alpha(four, {"enable_softmax": False}) == 2 * 9 * 4
    assert alpha({**four, "use_rslora": True}, {}) == 2 * 3 * 4
    assert alpha({**four, "lora_alpha": 5}, {}) == 5


def test_dead_experts_are_those_with_a_tenth_of_the_mean_scaling() -> None:
    def dead(*importance: float) -> tuple[int, ...]:
        return RoutingMetrics(importance, importance, 0.0, 0.0, 1).dead

    assert dead(0.5, 0.5) == dead(0.0, 0.0) == dead(1.0) == dead(0.7, 0.2, 0.1) == ()
    assert dead(0.9, 0.07, 0.03) == (2,)
    assert dead(-3.0, 2.0, 0.1) == (2,)


def never(model: Any, expert: str) -> None:
    """Let the router all but leave an expert out."""
    with torch.no_grad():
        model.router.logits[..., model.expert_names.index(expert)] -= 20


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_tells_dead_experts_by_name(
    evaluated: bool, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_initialise", lambda model, _: never(model, "e1"))
    data = {"train": texts(tmp_path), **({"eval": texts(tmp_path, first=100)} if evaluated else {})}
    told = list[str]()
    chosen = settings(files, tmp_path / "run", data=data, mixture={"router": "static"})
    done = run_training(chosen, tell=told.append)
    assert done.dead == ["e1"]
    assert "the text to evaluate with: e1." in told[-1] if evaluated else "of the training: e1." in told[-1]
    assert told[-1].startswith("Dead experts, with a mean scaling below 0.1 of the average on ")
    if evaluated:
        assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["dead_experts"] == ["e1"]


def plain_trainer(model: Any, output: Path, callback: RouterCallback) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8).tolist()]
    arguments = TrainingArguments(
        str(output), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback])  # pyright: ignore


def with_new(**config: Any) -> Any:
    torch.manual_seed(0)
    lora = {name: LoraConfig(r=2, target_modules=["q_proj"]) for name in ("a", "b", "c")}
    return get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=lora, use_trainable_adapters=True, **config))


def test_a_callback_balances_new_experts_and_warns_of_dead_ones_with_any_trainer(tmp_path: Path) -> None:
    model = with_new(router="static")
    never(model, "b")
    callback = RouterCallback()
    with pytest.warns(UserWarning, match=r"Dead experts.*: b\. Train again"):
        plain_trainer(model, tmp_path / "one", callback).train()
    assert callback.dead == ["b"]
    assert callback.objectives == RouterObjectives(load_balance=LOAD_BALANCE)
    callback = RouterCallback(RouterObjectives())
    model = with_new(**SPARSE)
    plain_trainer(model, tmp_path / "two", callback).train()
    assert (callback.dead, callback.objectives.load_balance) == ([], 0.0)
    model.save_pretrained(tmp_path / "mixture")
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path / "mixture", is_trainable=True)
    callback = RouterCallback()
    plain_trainer(loaded, tmp_path / "three", callback).train()  # its experts are not new any more
    assert callback.objectives == RouterObjectives()


def test_text_that_names_other_experts_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="math"):
        check(settings(files, tmp_path / "out"))
    named = {name: {"r": 2, "target_modules": ["q_proj"]} for name in files.experts}
    assert check(settings(files, tmp_path / "out", named)).plan.start == "labels"
    assert check(settings(files, tmp_path / "out", data=texts(tmp_path))).plan.start == "random"
