"""The public names are a promise: adding or losing one is a decision, made here."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import loramix

PUBLIC = {
    "AdapterError": "errors",
    "AdapterMismatchError": "errors",
    "AdapterNameError": "errors",
    "AutoPeftModel": "model.auto",
    "AutoPeftModelForCausalLM": "model.auto",
    "AutoPeftModelForFeatureExtraction": "model.auto",
    "AutoPeftModelForQuestionAnswering": "model.auto",
    "AutoPeftModelForSeq2SeqLM": "model.auto",
    "AutoPeftModelForSequenceClassification": "model.auto",
    "AutoPeftModelForTokenClassification": "model.auto",
    "CacheError": "errors",
    "CheckpointError": "errors",
    "CheckpointNotFoundError": "errors",
    "ConfigurationError": "errors",
    "CorruptCheckpointError": "errors",
    "DataError": "errors",
    "IncompleteCheckpointError": "errors",
    "LoraConfig": "config.lora",
    "LoramixError": "errors",
    "ModelError": "errors",
    "PeftConfig": "config.base",
    "PeftModel": "model.build",
    "PeftType": "config.base",
    "RoutingError": "errors",
    "SaveError": "errors",
    "TaskType": "config.base",
    "TrainingError": "errors",
    "TwoPassCache": "passes.cache",
    "UnsupportedAdapterError": "errors",
    "UnsupportedOperationError": "errors",
    "VersionError": "errors",
    "XLoraClassifier": "routers.classifier",
    "XLoraConfig": "config.xlora",
    "XLoraLayer": "layers.layer",
    "XLoraModel": "model.build",
    "create_reference_model": "model.reference",
    "get_peft_model": "model.build",
    "prepare_model_for_kbit_training": "model.kbit",
}


def test_the_set_of_public_names_is_locked() -> None:
    assert sorted(loramix.__all__) == sorted([*PUBLIC, "__version__"])


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_the_object_of_its_module(name: str) -> None:
    assert getattr(loramix, name) is getattr(importlib.import_module(f"loramix.{PUBLIC[name]}"), name)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(loramix.__file__).read_text())
    seen = {
        alias.name: (node.module or "").removeprefix("loramix.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == PUBLIC


def test_every_error_is_public() -> None:
    from loramix import errors

    own = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert own == {name for name, module in PUBLIC.items() if module == "errors"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'loramix' has no attribute 'get_peft_modell'"):
        _ = loramix.get_peft_modell  # pyright: ignore[reportAttributeAccessIssue]


def test_dir_lists_the_public_names() -> None:
    assert set(PUBLIC) < set(dir(loramix))


def test_the_version_is_one_that_pip_accepts() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", loramix.__version__)


TRAINING = {
    "Distillation": "distil",
    "ExpertFit": "one_expert",
    "ExpertLabels": "data",
    "FiniteGradients": "objectives",
    "RouterCallback": "objectives",
    "RouterObjectives": "objectives",
    "Row": "data",
    "ScalingPassCache": "recall",
    "distil_router": "distil",
    "fit_expert": "one_expert",
    "init_router": "initialise",
    "read_rows": "data",
    "required_bytes": "recall",
}


def test_the_public_names_of_training_are_locked() -> None:
    from loramix import training

    assert sorted(training.__all__) == sorted(TRAINING)
    for name, home in TRAINING.items():
        assert getattr(training, name) is getattr(importlib.import_module(f"loramix.training.{home}"), name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = training.nonsense


ANALYSIS = {
    "Confusion": "compare",
    "Drift": "compare",
    "Inspection": "inspection",
    "RoutingMeter": "metrics",
    "RoutingMetrics": "metrics",
    "RoutingStreamer": "show.live",
    "WrittenToken": "show.live",
    "stream_routing": "show.live",
    "RoutingRecord": "record.record",
    "agreement": "compare",
    "confusion": "compare",
    "drift": "compare",
    "expert_colours": "colours",
    "inspect_texts": "inspection",
    "record_routing": "record.recorder",
    "report_html": "report.report",
    "write_report": "report.report",
}


def test_the_public_names_of_analysis_are_locked() -> None:
    from loramix import analysis

    assert sorted(analysis.__all__) == sorted(ANALYSIS)
    for name, home in ANALYSIS.items():
        assert getattr(analysis, name) is getattr(importlib.import_module(f"loramix.analysis.{home}"), name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = analysis.nonsense


EVALUATION = {
    "Ceiling": "ceiling",
    "Evaluation": "scores",
    "LeaveOneOut": "ablation",
    "causal_ceiling": "ceiling",
    "evaluate": "scores",
    "leave_one_out": "ablation",
}


def test_the_public_names_of_evaluation_are_locked() -> None:
    from loramix import evaluation

    assert sorted(evaluation.__all__) == sorted(EVALUATION)
    for name, home in EVALUATION.items():
        assert getattr(evaluation, name) is getattr(importlib.import_module(f"loramix.evaluation.{home}"), name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = evaluation.nonsense
