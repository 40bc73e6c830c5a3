"""Every way in which the files of a mixture can be wrong."""

from __future__ import annotations

import shutil

import pytest
import torch

from loramix.errors import (
    AdapterMismatchError,
    AdapterNameError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedAdapterError,
)
from loramix.formats import load_mixture, save_adapter, save_mixture
from support.checkpoints import HIDDEN, edit_config, edit_tensors, make_expert, make_mixture

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.internal_xlora_classifier."


def test_an_expert_instead_of_a_mixture(folder):
    with pytest.raises(CheckpointError, match=r"one expert .*'lora'") as caught:
        load_mixture(folder / "math")
    assert str(folder / "math") in caught.value.received


def test_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="gone"):
        load_mixture(tmp_path / "gone")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointNotFoundError, match="neither"):
        load_mixture(folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 64])
def test_a_broken_classifier_file(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CorruptCheckpointError) as caught:
        load_mixture(folder)
    assert str(folder / WEIGHTS) in caught.value.received


def test_an_expert_that_is_missing(folder):
    shutil.rmtree(folder / "math")
    edit_config(folder, adapters={"math": "./not-here", "code": "code"})
    with pytest.raises(CheckpointNotFoundError) as caught:
        load_mixture(folder)
    assert "'math'" in caught.value.received
    assert "./not-here" in caught.value.received
    assert str(folder) in caught.value.received
    assert '"math"' in caught.value.remedy


def test_a_broken_expert_inside_does_not_fall_back_to_the_identifier(folder, others):
    edit_config(folder, adapters={"math": str(others["new1"]), "code": str(others["new2"])})
    (folder / "math" / WEIGHTS).write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match="'math'"):
        load_mixture(folder)


def test_an_unsupported_expert(folder):
    edit_config(folder / "code", use_qalora=True)
    with pytest.raises(UnsupportedAdapterError, match=r"'code'.*use_qalora=True"):
        load_mixture(folder)


@pytest.mark.parametrize("path", ["", ".", "..", "math/.."])
def test_a_path_that_means_the_mixture_itself(folder, path):
    shutil.rmtree(folder / "math")
    edit_config(folder, adapters={"math": path, "code": "code"})
    with pytest.raises(CheckpointError) as caught:
        load_mixture(folder)
    assert "'math'" in caught.value.received


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t | {f"{KEY}layers.1.weight": torch.ones(2, 2)}, "layers.1.weight"),
        (lambda t: t | {f"{KEY}layers.0.weight": torch.ones(8, 99)}, "(8, 99)"),
        (lambda t: t | {f"{KEY}layers.3.weight": torch.ones(3, 8), f"{KEY}layers.3.bias": torch.ones(3)}, "(3, 8)"),
        (lambda t: t | {"base_model.other": torch.ones(1)}, "base_model.other"),
        (lambda t: t | {"internal_xlora_classifier.layers.0.bias": torch.ones(8)}, "layers.0.bias"),
    ],
)
def test_tensors_that_the_configuration_does_not_ask_for(folder, change, named):
    edit_tensors(folder, change)
    with pytest.raises(CorruptCheckpointError) as caught:
        load_mixture(folder)
    assert named in caught.value.received
    assert str(folder / WEIGHTS) in caught.value.received


def test_layerwise_outputs_that_no_number_of_layers_gives(tmp_path):
    save_mixture(tmp_path, *make_mixture(layerwise_scalings=True))
    edit_tensors(tmp_path, lambda t: {key: torch.ones(5, *tensor.shape[1:]) for key, tensor in t.items()})
    with pytest.raises(CorruptCheckpointError, match=r"2 experts on 2 layers: .* \(4, 16\), found \(5, 16\)"):
        load_mixture(tmp_path)


@pytest.mark.parametrize("rows", [2, 6], ids=["too few", "too many"])
def test_layerwise_outputs_for_another_number_of_layers(tmp_path, rows):
    save_mixture(tmp_path, *make_mixture(layerwise_scalings=True))
    edit_tensors(tmp_path, lambda t: {key: torch.ones(rows, *tensor.shape[1:]) for key, tensor in t.items()})
    with pytest.raises(CorruptCheckpointError, match=rf"\(4,\), found \({rows},\)"):
        load_mixture(tmp_path)


def test_replaced_experts_on_other_layers_than_a_layerwise_router_has(tmp_path):
    save_mixture(tmp_path / "mixture", *make_mixture(layerwise_scalings=True))
    save_adapter(tmp_path / "new", make_expert("new", modules=["model.layers.0.q", "model.layers.2.q"]))
    with pytest.raises(AdapterMismatchError) as caught:
        load_mixture(tmp_path / "mixture", adapters={"code": tmp_path / "new"})
    assert "'code', with which 3 layers are adapted" in caught.value.received
    assert f"(6, {HIDDEN}), found (4, {HIDDEN})" in caught.value.received
    assert "target_modules" in caught.value.remedy


@pytest.mark.parametrize(
    "change", [lambda t: t * float("nan"), lambda t: t.int()], ids=["not a number", "whole numbers"]
)
def test_numbers_that_no_classifier_has(folder, change):
    key = f"{KEY}layers.0.weight"
    edit_tensors(folder, lambda tensors: tensors | {key: change(tensors[key])})
    with pytest.raises(CorruptCheckpointError, match="finite floating-point"):
        load_mixture(folder)


@pytest.mark.parametrize("adapters", [None, {}])
@pytest.mark.filterwarnings("ignore:adapters was not given")
def test_a_mixture_of_nothing(folder, adapters):
    edit_config(folder, adapters=adapters)
    with pytest.raises(ConfigurationError, match="names its experts"):
        load_mixture(folder)


def test_a_file_without_any_tensor(folder):
    edit_tensors(folder, lambda t: {})
    with pytest.raises(IncompleteCheckpointError, match=r"layers\.3\.bias"):
        load_mixture(folder)


def test_names_that_clash_in_the_file(folder):
    edit_config(folder, adapters={"math": "a", "Math": "b"})
    with pytest.raises(AdapterNameError, match=r"'math' and 'Math'.*adapter_config\.json"):
        load_mixture(folder)
