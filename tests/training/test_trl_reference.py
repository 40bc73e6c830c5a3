"""TRL's trainers compare a mixture with the mixture as it was at step 0, as they do for PEFT's models."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from loramix import PeftModel, XLoraConfig, XLoraModel, create_reference_model, get_peft_model
from loramix.model import trl as patch
from support.mixtures import far, logits_of
from support.training_files import Files

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]

PROMPTS = {"prompt": ["2 + 2 =", "def f("] * 4}
PAIRS = {**PROMPTS, "chosen": [" 4", "x):"] * 4, "rejected": [" 9", "!!"] * 4}
LABELLED = {**PROMPTS, "completion": [" 4", "x):"] * 4, "label": [True, False] * 4}
CONTEXTS = {**PROMPTS, "privileged_context": [" 4", "x):"] * 4}
TRIPLES = {**PAIRS, "reference": [" 4!", "y):"] * 4}


def every_other(completions: list[str], **_: object) -> list[float]:
    """A reward that is not the same for all."""
    return [float(number % 2) for number in range(len(completions))]


def scorer(files: Files) -> Any:
    """A reward model."""
    return AutoModelForSequenceClassification.from_pretrained(files.base, num_labels=1)


@dataclass(frozen=True)
class Case:
    """How a trainer of TRL is set up, and the figure of its log that is 0 where the model is its own reference."""

    data: dict[str, Any]
    zero: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


REWARDED = {"reward_funcs": every_other}
GROUPS = {"max_completion_length": 4, "num_generations": 2}
PENALISED = Case(PROMPTS, "kl", {**GROUPS, "beta": 0.1}, REWARDED)
SHORT = {"max_new_tokens": 4, "max_length": 64}
VALUES = {"max_completion_length": 4, "num_value_samples": 2, "filter_all_incorrect": False}
CASES = {
    "trl.trainer.dpo_trainer.DPOTrainer": Case(PAIRS, "rewards/chosen"),
    "trl.trainer.kto_trainer.KTOTrainer": Case(LABELLED, "rewards/chosen"),
    "trl.trainer.grpo_trainer.GRPOTrainer": PENALISED,
    "trl.trainer.rloo_trainer.RLOOTrainer": PENALISED,
    "trl.experimental.a2po.a2po_trainer.A2POTrainer": Case(PROMPTS, "implicit_reward", VALUES, REWARDED),
    "trl.experimental.online_dpo.online_dpo_trainer.OnlineDPOTrainer": Case(PROMPTS, "objective/kl", SHORT, REWARDED),
    "trl.experimental.sdft.sdft_trainer.SDFTTrainer": Case(CONTEXTS, None, GROUPS),
    "trl.experimental.sdpo.sdpo_trainer.SDPOTrainer": Case(
        CONTEXTS, None, {**GROUPS, "teacher_model_kind": "base"}, REWARDED
    ),
    # of earlier versions
    "trl.experimental.bco.bco_trainer.BCOTrainer": Case(LABELLED, "rewards/chosen"),
    "trl.experimental.kto.kto_trainer.KTOTrainer": Case(LABELLED, "rewards/chosen"),
    "trl.experimental.ppo.ppo_trainer.PPOTrainer": Case(
        PROMPTS,
        "objective/kl",
        {"response_length": 4, "total_episodes": 4, "num_ppo_epochs": 2, "num_mini_batches": 1},
        {"ref_model": None, "reward_model": scorer, "value_model": scorer},
    ),
    # these inherit it
    "trl.experimental.gmpo.gmpo_trainer.GMPOTrainer": PENALISED,
    "trl.experimental.nash_md.nash_md_trainer.NashMDTrainer": Case(PROMPTS, "loss/kl", SHORT, {"reward_funcs": scorer}),
    "trl.experimental.xpo.xpo_trainer.XPOTrainer": Case(PROMPTS, "objective/kl", SHORT, {"reward_funcs": scorer}),
}
TAKES_ONE = [name for name in CASES if re.search(r"\.((Online)?DPO|KTO|BCO|NashMD|XPO)Trainer", name)]
MAKES_ONE = re.compile(r"create_reference_model\(|create_model_from_path\((get_config_model_id|ref_model_path)")
INHERITS_ONE = re.compile(r"class \w+Trainer\((OnlineDPO|GRPO)Trainer\):")
DPO, GRPO = "trl.trainer.dpo_trainer.DPOTrainer", "trl.trainer.grpo_trainer.GRPOTrainer"


def trl_sources() -> dict[str, str]:
    """The trainers' modules and their text."""
    (root,) = map(Path, importlib.import_module("trl").__path__)
    files = root.rglob("*_trainer.py")
    return {".".join(p.relative_to(root.parent).with_suffix("").parts): p.read_text(encoding="utf-8") for p in files}


SOURCES = trl_sources()
MAKERS = {name for name, text in SOURCES.items() if MAKES_ONE.search(text)}
HEIRS = {name for name, text in SOURCES.items() if INHERITS_ONE.search(text)}


def shipped(names: Any) -> list[str]:
    return [name for name in names if name.rpartition(".")[0] in MAKERS | HEIRS]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    disable_progress_bars()


def base(files: Files) -> Any:
    return AutoModelForCausalLM.from_pretrained(files.base)


def mixture(files: Files, **config: Any) -> Any:
    model = base(files)
    torch.manual_seed(3)
    settings = {"hidden_size": 64, "adapters": files.experts, "xlora_depth": 1, **config}
    return get_peft_model(model, XLoraConfig(**settings))


def trainer(name: str, model: Any, files: Files, folder: Path, case: Case | None = None, **arguments: Any) -> Any:
    """A trainer of two steps.

    Args:
        name: its module and class.
        model: what it trains.
        files: where the tokenizer is.
        folder: its output.
        case: how it is set up.
        **arguments: more of the trainer's own; `settings` are those of its configuration.
    """
    path, _, kind = name.rpartition(".")
    case = case or CASES[name]
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **case.settings,
        **arguments.pop("settings", {}),
    }
    config = getattr(importlib.import_module(f"{path.removesuffix('_trainer')}_config"), f"{kind[:-7]}Config")
    tokenizer = AutoTokenizer.from_pretrained(files.base, pad_token="<s>", padding_side="left")
    data = Dataset.from_dict(case.data)
    if "ppo" in path:
        data = data.map(lambda row: tokenizer(row["prompt"]), remove_columns=["prompt"])
    return getattr(importlib.import_module(path), kind)(
        model=model,
        args=config(str(folder), **settings),
        train_dataset=data,
        processing_class=tokenizer,
        **{name: value(files) if value is scorer else value for name, value in case.arguments.items()},
        **arguments,
    )


def first_figures(runner: Any) -> dict[str, float]:
    runner.train()
    return runner.state.log_history[0]


@pytest.mark.parametrize("name", shipped(CASES))
def test_the_reference_is_the_mixture_at_step_0(name: str, files: Files, tmp_path: Path) -> None:
    model = mixture(files)
    before = logits_of(model.eval())
    runner = trainer(name, model, files, tmp_path)
    reference = runner.ref_model if CASES[name].zero else runner.teacher_model
    assert isinstance(reference, XLoraModel)
    assert torch.equal(logits_of(reference), before)
    figures, zero = first_figures(runner), CASES[name].zero
    assert zero is None or figures[zero] == pytest.approx(0, abs=1e-6)  # PPO compares a generation with a forward
    assert far(logits_of(model.eval()), before)
    assert torch.equal(logits_of(reference), before)


@pytest.mark.parametrize("name", shipped(TAKES_ONE))
def test_a_reference_that_is_given_is_used(name: str, files: Files, tmp_path: Path) -> None:
    model = mixture(files)
    reference = create_reference_model(model)
    runner = trainer(name, model, files, tmp_path, ref_model=reference)
    assert runner.ref_model is reference
    assert first_figures(runner)[CASES[name].zero or ""] == 0


def test_every_trainer_that_makes_a_reference_is_tested() -> None:
    assert {name.rpartition(".")[0] for name in shipped(CASES)} >= MAKERS


def test_the_reference_shares_the_weights_that_do_not_train(files: Files, tmp_path: Path) -> None:
    """Nor is the base model's name asked for: a base model may have been built in memory."""
    model = mixture(files)
    model.config._name_or_path = ""
    reference = trainer(DPO, model, files, tmp_path).ref_model
    own = dict(model.named_parameters())
    copied = {name for name, parameter in reference.named_parameters() if parameter is not own[name]}
    assert copied == {name for name, parameter in own.items() if parameter.requires_grad}


def test_the_plain_base_model_is_the_reference_where_it_is_given(files: Files, tmp_path: Path) -> None:
    runner = trainer(DPO, mixture(files), files, tmp_path, ref_model=base(files))
    assert not isinstance(runner.ref_model, PeftModel)
    assert first_figures(runner)["rewards/chosen"] != 0


def test_a_model_with_one_expert_has_its_own_reference(files: Files, tmp_path: Path) -> None:
    model: Any = PeftModel.from_pretrained(base(files), files.experts["math"], is_trainable=True)
    runner = trainer(DPO, model, files, tmp_path)
    assert far(logits_of(runner.ref_model), logits_of(base(files)))
    assert first_figures(runner)["rewards/chosen"] == 0


def test_a_plain_model_has_the_reference_that_trl_makes(files: Files, tmp_path: Path) -> None:
    """Also where a mixture was trained before."""
    trainer(DPO, mixture(files), files, tmp_path)
    model = base(files)
    runner = trainer(DPO, model, files, tmp_path)
    assert not isinstance(runner.ref_model, PeftModel)
    assert runner.ref_model.lm_head.weight is not model.lm_head.weight


def test_log_probabilities_that_are_computed_before_are_those_of_the_mixture(files: Files, tmp_path: Path) -> None:
    runner = trainer(DPO, mixture(files), files, tmp_path, settings={"precompute_ref_log_probs": True})
    assert first_figures(runner)["rewards/chosen"] == 0


def test_without_a_penalty_there_is_no_reference(files: Files, tmp_path: Path) -> None:
    runner = trainer(GRPO, mixture(files), files, tmp_path, settings={"beta": 0.0})
    assert runner.ref_model is None
    assert "kl" not in first_figures(runner)


WITHOUT_ONE = {
    "trl.experimental.cpo.cpo_trainer.CPOTrainer": Case(PAIRS, None, {"max_length": 32}),
    "trl.experimental.orpo.orpo_trainer.ORPOTrainer": Case(PAIRS, None, {"max_length": 32}),
    "trl.experimental.tpo.tpo_trainer.TPOTrainer": Case(TRIPLES, None),
}
TEACHING = "trl.trainer.distillation_trainer"


@pytest.mark.parametrize("name", [name for name in WITHOUT_ONE if name.rpartition(".")[0] in SOURCES])
def test_trainers_without_a_reference_train(name: str, files: Files, tmp_path: Path) -> None:
    model = mixture(files)
    before = logits_of(model.eval())
    trainer(name, model, files, tmp_path, WITHOUT_ONE[name]).train()
    assert far(logits_of(model.eval()), before)


@pytest.mark.skipif(TEACHING not in SOURCES, reason="an earlier TRL, without a DistillationTrainer")
def test_a_teacher_by_the_name_of_the_base_model_is_that(files: Files, tmp_path: Path) -> None:
    case = Case(PROMPTS, None, {"max_completion_length": 4})
    name, teacher = f"{TEACHING}.DistillationTrainer", str(files.base)
    runner = trainer(name, mixture(files), files, tmp_path, case, teacher_model=teacher)
    assert not isinstance(runner.teacher_model, PeftModel)


def test_a_reference_that_follows_moves_what_trains_alone(files: Files, tmp_path: Path) -> None:
    """TRL averages model and reference in place, parameter by parameter."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.25, "max_steps": 1}
    model = mixture(files)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    runner = trainer(DPO, model, files, tmp_path, settings=settings)
    runner.train()
    end = dict(model.named_parameters())
    for name, parameter in runner.ref_model.named_parameters():
        if parameter is end[name]:
            assert torch.equal(parameter, start[name])
        else:
            assert far(end[name], start[name])
            torch.testing.assert_close(parameter, 0.75 * start[name] + 0.25 * end[name])


@pytest.mark.parametrize("imported", [False, True])
def test_a_module_is_changed_once_it_is_imported(
    imported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"imported_{'before' if imported else 'after'}"
    (tmp_path / f"{name}.py").write_text("found = ['imported']", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(patch, "_CHANGES", {name: lambda module: module.found.append("changed")})
    if imported:
        importlib.import_module(name)
    patch.watch()
    assert importlib.import_module(name).found == ["imported", "changed"]
    assert importlib.reload(sys.modules[name]).found == ["imported"]


def test_modules_that_were_imported_before_are_changed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "__init__", Trainer.__init__)
    utils, early = ModuleType("trl.early_utils"), ModuleType("trl.early_trainer")
    for module in (utils, early):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(get_config_model_id=str, create_model_from_path=str.upper)
    patch._change_utils(utils)
    assert vars(early)["create_model_from_path"] is vars(utils)["create_model_from_path"] is not str.upper
    assert vars(early)["create_model_from_path"]("name") == "NAME"


@pytest.mark.slow
def test_trl_may_be_imported_first() -> None:
    code = (
        "import trl.trainer.grpo_trainer as grpo, loramix.model\n"
        "assert grpo.create_model_from_path.__wrapped__.__module__ == 'trl.trainer.utils'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trl_that_makes_references_otherwise_is_told() -> None:
    with pytest.warns(UserWarning, match=r"pass ref_model=loramix\.create_reference_model\(model\)"):
        patch._change_utils(ModuleType("trl.trainer.utils"))
