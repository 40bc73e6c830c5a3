"""Conversion of a mixture: what is written, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loramix import ConfigurationError, PeftModel, SaveError, UnsupportedOperationError
from loramix.errors import CheckpointNotFoundError, IncompleteCheckpointError
from loramix.formats import load_mixture, save_adapter, save_mixture
from loramix.model.convert import convert
from support.checkpoints import contents, make_expert, make_mixture, same_tensors
from support.mixtures import logits_of, mixture
from support.tiny import gpt2, llama, save_expert


@pytest.fixture
def saved(experts: Any, tmp_path: Path) -> Path:
    """A layerwise mixture on a base model that lies in a folder."""
    llama().save_pretrained(tmp_path / "base")
    config = {"layerwise_scalings": True, "base_model_name_or_path": str(tmp_path / "base")}
    mixture(experts("llama"), **config).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_the_report(saved: Path, tmp_path: Path) -> None:
    (saved / "trainer_state.json").write_text("{}")
    done = convert(saved, tmp_path / "new", "original")
    assert (done.source_format, done.format, done.num_layers, done.ordering) == ("xlora", "original", 14, True)
    assert done.experts == {name: name for name in ("math", "code", "prose")}
    assert "trainer_state.json is not copied." in done.notes
    assert json.loads(json.dumps(done.to_dict()))["folder"] == str(tmp_path / "new")


def test_fields_that_the_original_library_lacks_are_told(tmp_path: Path) -> None:
    save_mixture(tmp_path / "mixture", *make_mixture(task_type="CAUSAL_LM", revision="v1"))
    notes = convert(tmp_path / "mixture", tmp_path / "new", "original").notes
    assert {note.split("=")[0] for note in notes if "no such field" in note} == {"task_type", "revision"}


def test_the_ordering_file_of_mistral_rs(saved: Path, tmp_path: Path) -> None:
    convert(saved, tmp_path / "new", "original")
    ordering = json.loads((tmp_path / "new" / "ordering.json").read_text())
    model: Any = PeftModel.from_pretrained(llama(), saved)
    assert ordering == {
        "order": ["math", "code", "prose"],
        "layers": {path: number for number, path in enumerate(model.adapted_modules)},
        "base_model_id": str(tmp_path / "base"),
    }
    assert ordering["layers"]["model.layers.1.self_attn.q_proj"] == 7
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path / "new")), logits_of(model))


def test_without_the_base_model_there_is_no_ordering_file(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    done = convert(saved, tmp_path / "new", "original")
    assert not done.ordering
    assert any("ordering.json" in note and "--base" in note for note in done.notes)
    assert not (tmp_path / "new" / "ordering.json").exists()
    assert convert(saved, tmp_path / "again", "original", base=str(tmp_path / "moved")).ordering
    with pytest.raises(CheckpointNotFoundError):
        convert(saved, tmp_path / "third", "original", base=str(tmp_path / "nowhere"))


def test_the_ordering_file_needs_the_paths_of_the_layers(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperationError, match="loramix convert"):
        save_mixture(tmp_path, *make_mixture(), format="mistral.rs")
    save_mixture(tmp_path, *make_mixture(), layers=["model.layers.0.q", "model.layers.1.q"], format="mistral.rs")
    assert set(contents(tmp_path)) == {"ordering.json"}


def test_for_peft_experts_have_numbers_and_places(saved: Path, tmp_path: Path) -> None:
    done = convert(saved, tmp_path / "new", "peft")
    assert done.experts == {"math": "0", "code": "1", "prose": "2"}
    assert "math is 0, code is 1, prose is 2" in done.notes[0]
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["peft_type"] == "XLORA"
    assert config["adapters"] == {str(i): str(tmp_path / "new" / str(i)) for i in range(3)}
    shutil.move(tmp_path / "new", tmp_path / "moved")
    assert torch.equal(
        load_mixture(tmp_path / "moved").router["layers.0.bias"], load_mixture(saved).router["layers.0.bias"]
    )


def test_what_peft_has_not_is_added_or_dropped_where_nothing_changes(tmp_path: Path) -> None:
    parts = {"use_bias": False, "enable_relu_and_dropout": False}
    save_mixture(tmp_path / "mixture", *make_mixture(**parts))
    notes = convert(tmp_path / "mixture", tmp_path / "new", "peft").notes
    assert all(any(f"{name}=False is not kept" in note for note in notes) for name in parts)
    router = load_mixture(tmp_path / "new").router
    assert not router["layers.0.bias"].any()
    assert same_tensors({"layers.0.bias": torch.zeros(2)} | make_mixture(**parts)[1], router)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"router": "static"}, "router='static'"),
        ({"xlora_depth": 2, "xlora_size": 8, "enable_relu_and_dropout": False}, "enable_relu_and_dropout=False"),
        ({"top_k_lora": 1, "scaling_pass_value": 0.5}, "top_k_lora=1 with scaling_pass_value=0.5"),
        ({"elsewhere": {"vision": "uniform"}}, "elsewhere="),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_name(settings: Any, named: str, tmp_path: Path) -> None:
    save_mixture(tmp_path / "mixture", *make_mixture(**settings))
    with pytest.raises(UnsupportedOperationError) as caught:
        convert(tmp_path / "mixture", tmp_path / "new", "peft")
    assert named in caught.value.received
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("expert", "named"),
    [
        ({"use_dora": True}, "'1' with use_dora=True"),
        ({"lora_bias": True}, "'1' with lora_bias=True"),
        ({"modules": ["lm_head"]}, "'1' with the layer 'lm_head'"),
    ],
)
def test_experts_that_peft_cannot_run_are_refused_by_name(expert: Any, named: str, tmp_path: Path) -> None:
    config, router, (first, _) = make_mixture()
    save_mixture(tmp_path / "mixture", config, router, [first, make_expert("code", **expert)])
    with pytest.raises(UnsupportedOperationError, match=named):
        convert(tmp_path / "mixture", tmp_path / "new", "peft")


def test_experts_of_gpt2_are_refused_for_peft(tmp_path: Path) -> None:
    place = save_expert(tmp_path / "expert", gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    mixture({"a": place}, base=gpt2()).save_pretrained(tmp_path / "mixture")
    with pytest.raises(UnsupportedOperationError, match=r"layer 'transformer\.h\.0\.attn\.c_attn'"):
        convert(tmp_path / "mixture", tmp_path / "new", "peft")


def test_a_registered_format_refuses_names_that_peft_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperationError, match="expert 0 called 'math'"):
        save_mixture(tmp_path, *make_mixture(), format="peft")


def test_experts_are_replaced_on_the_way(tmp_path: Path) -> None:
    save_mixture(tmp_path / "mixture", *make_mixture())
    save_adapter(tmp_path / "new-code", make_expert("code", seed=9, r=4))
    convert(tmp_path / "mixture", tmp_path / "new", "loramix", adapters={"code": tmp_path / "new-code"})
    assert [expert.config.r for expert in load_mixture(tmp_path / "new").experts] == [2, 4]


def test_only_a_new_or_empty_folder_is_written(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(saved, tmp_path / "empty", "loramix")
    before = contents(tmp_path / "empty")
    for place in ("empty", "empty/adapter_config.json"):
        with pytest.raises(SaveError, match="new or empty"):
            convert(saved, tmp_path / place, "peft")
    assert contents(tmp_path / "empty") == before


def test_bad_calls(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="to='onnx'"):
        convert(saved, tmp_path / "new", "onnx")
    with pytest.raises(CheckpointNotFoundError):
        convert(tmp_path / "nowhere", tmp_path / "new", "peft")
    (saved / "code" / "adapter_config.json").unlink()
    with pytest.raises((CheckpointNotFoundError, IncompleteCheckpointError), match="code"):
        convert(saved, tmp_path / "new", "peft")
