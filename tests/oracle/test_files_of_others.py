"""Experts' files of every age and tool: what PEFT computes with a file is what we do, or the remedy leads there."""

from __future__ import annotations

import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix import errors
from support.mixtures import far, logits_of, mixture
from support.peft_side import PEFT_WARNINGS, lora, write_expert
from support.tiny import llama

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ALL = ["q_proj", "v_proj", "up_proj"]
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert of PEFT's, with patterns."""
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"model.layers.1.mlp.up_proj": 3}}
    return Path(write_expert(tmp_path_factory.mktemp("good") / "expert", llama(), target_modules=ALL, **patterns))


@pytest.fixture(scope="module")
def expected(good: Path) -> Tensor:
    logits = logits_of(lora(llama(), str(good)))
    assert far(logits_of(llama()), logits)
    return logits


def alone(folder: Path | str, base: Any = None) -> Tensor:
    """The logits of a mixture of this expert and another, at the scalings 1 and 0."""
    model = mixture({"it": str(folder), "again": str(folder)}, base=base or llama())
    with model.fixed_scalings([1.0, 0.0]):
        return logits_of(model)


def rewritten(good: Path, folder: Path, rename: Rename = str, **config: Any) -> Path:
    """A copy with other keys, and other values in its configuration."""
    shutil.copytree(good, folder)
    save_file({rename(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    saved = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(saved | config))
    return folder


KEYS: dict[str, Rename] = {
    "a compiled model": lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
    "a compiled model of PEFT's": lambda key: f"_orig_mod.{key}",
    "compiled blocks": lambda key: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", key),
    "a compiled layer": lambda key: key.replace("q_proj.", "q_proj._orig_mod."),
    "DDP": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(PREFIX, PREFIX + "module."),
    "DDP, compiled": lambda key: f"_orig_mod.module.{key}",
    "FSDP": lambda key: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", f"_fsdp_wrapped_module.{key}"),
    "checkpointing": lambda key: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", key),
    "all together": lambda key: re.sub(
        r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", f"module._orig_mod.{key}"
    ).replace(PREFIX, "base_model._fsdp_wrapped_module.model."),
    "FSDP's layers of an adapter": lambda key: key.replace(".weight", ".default._fsdp_wrapped_module.weight"),
    "an adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "no prefix, DDP": lambda key: "module." + key.removeprefix(PREFIX),
}


@pytest.mark.parametrize("case", KEYS)
def test_names_of_wrappers_in_keys_are_left_out(case: str, good: Path, expected: Tensor, tmp_path: Path) -> None:
    folder = rewritten(good, tmp_path / "it", KEYS[case])
    assert_close(alone(folder), expected, atol=1e-5, rtol=1e-5)


def test_names_of_wrappers_in_the_configuration(good: Path, expected: Tensor, tmp_path: Path) -> None:
    place = "_orig_mod.model.layers.{}._checkpoint_wrapped_module."
    folder = rewritten(
        good,
        tmp_path / "it",
        KEYS["a compiled model"],
        rank_pattern={place.format(0) + "self_attn.q_proj": 6},
        alpha_pattern={re.escape(place.format(1)) + r"mlp\.up_proj": 3},
        target_modules=[f"_orig_mod.model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj",)] + ALL,
    )
    assert_close(alone(folder), expected, atol=1e-5, rtol=1e-5)


class Wrapper(torch.nn.Module):
    """What holds a module under a wrapper's name, and is called in its place."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(self.children())(*args, **kwargs)


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_base_model_with_wrappers_inside(name: str, good: Path, expected: Tensor, tmp_path: Path) -> None:
    def base() -> Any:
        model: Any = llama()
        for block in model.model.layers:
            block.mlp = Wrapper(name, block.mlp)
        return model

    assert_close(alone(good, base()), expected, atol=1e-5, rtol=1e-5)
    trained = write_expert(tmp_path / "trained", base(), target_modules=ALL)
    assert any(f".mlp.{name}." in key for key in load_file(Path(trained) / WEIGHTS))
    theirs = logits_of(lora(base(), trained))
    assert_close(alone(trained, base()), theirs, atol=1e-5, rtol=1e-5)
    assert_close(alone(trained), theirs, atol=1e-5, rtol=1e-5)
    model = mixture({"it": str(good)}, base=base())
    model.save_pretrained(tmp_path / "mixture")
    again: Any = loramix.PeftModel.from_pretrained(llama(), tmp_path / "mixture")
    assert torch.equal(logits_of(again), logits_of(model))


def converted(folder: Path, change: Callable[[Path], Any]) -> Path:
    change(folder)
    return folder


def encoded(encoding: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(text, encoding=encoding)

    return change


def pickled(change: Callable[[dict[str, Tensor]], Any] = dict) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        torch.save(change(load_file(folder / WEIGHTS)), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()

    return write


def as_parameters(tensors: dict[str, Tensor]) -> Any:
    return OrderedDict((key, torch.nn.Parameter(tensor)) for key, tensor in tensors.items())


def sharded(index: str, write: Callable[[dict[str, Tensor], Path], Any], suffix: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = [f"adapter_model-{i + 1:05d}-of-00003.{suffix}" for i in range(3)]
        shards = {key: names[i % 3] for i, key in enumerate(tensors)}
        for name in names:
            write({key: tensors[key] for key, shard in shards.items() if shard == name}, folder / name)
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))

    return change


in_safetensors = sharded("adapter_model.safetensors.index.json", save_file, "safetensors")
FILES: dict[str, Callable[[Path], Any]] = {
    "a byte order mark": encoded("utf-8-sig"),
    "UTF-16": encoded("utf-16"),
    "a pickle": pickled(),
    "a pickle of parameters": pickled(as_parameters),
    "shards": in_safetensors,
    "shards of transformers": sharded("model.safetensors.index.json", save_file, "safetensors"),
    "shards of pickles": sharded("adapter_model.bin.index.json", torch.save, "bin"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_every_kind(case: str, good: Path, expected: Tensor, tmp_path: Path) -> None:
    folder = converted(rewritten(good, tmp_path / "it"), FILES[case])
    assert_close(alone(folder), expected, atol=1e-5, rtol=1e-5)
    model: Any = loramix.PeftModel.from_pretrained(llama(), folder)
    assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_shards_that_transformers_writes(good: Path, expected: Tensor, tmp_path: Path) -> None:
    base: Any = llama()
    base.load_adapter(str(good))
    base.save_pretrained(tmp_path / "it", max_shard_size=3000)
    assert len(list((tmp_path / "it").glob("adapter_model-*"))) > 1
    assert_close(alone(tmp_path / "it"), expected, atol=1e-5, rtol=1e-5)


def test_an_index_that_lies(good: Path, tmp_path: Path) -> None:
    def refusal(name: str, change: Callable[[Path, dict[str, str]], Any]) -> errors.LoramixError:
        folder = converted(rewritten(good, tmp_path / name), in_safetensors)
        index = folder / "adapter_model.safetensors.index.json"
        shards = json.loads(index.read_text())["weight_map"]
        change(folder, shards)
        index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(errors.CheckpointError) as caught:
            alone(folder)
        assert "'it'" in caught.value.received
        return caught.value

    second = "adapter_model-00002-of-00003.safetensors"
    found = refusal("missing", lambda folder, _: (folder / second).unlink())
    assert isinstance(found, errors.IncompleteCheckpointError)
    assert f"{second} is missing" in found.received
    found = refusal("lacking", lambda _, shards: shards.update({"a.lora_A.weight": second}))
    assert isinstance(found, errors.IncompleteCheckpointError)
    assert "lacks 'a.lora_A.weight'" in found.received
    for name in ("../good/expert/adapter_model.safetensors", "/etc/passwd", "other.safetensors", 3):
        found = refusal(f"climbing {hash(name)}", lambda _, shards, name=name: shards.update({"a": name}))
        assert isinstance(found, errors.CorruptCheckpointError)
    found = refusal("twice", lambda folder, _: save_file(load_file(folder / second), folder / second.replace("2", "1")))
    assert isinstance(found, errors.IncompleteCheckpointError | errors.CorruptCheckpointError)


def test_what_peft_takes_null_for(good: Path, expected: Tensor, tmp_path: Path) -> None:
    """Field by field: where PEFT loads the file, so do we, and compute the same."""
    taken = 0
    for name in json.loads((good / CONFIG).read_text()):
        folder = rewritten(good, tmp_path / name, **{name: None})
        try:
            theirs = logits_of(lora(llama(), str(folder)))
        except Exception:  # whatever PEFT says to a value that it cannot use
            continue
        if name == "target_modules" or far(theirs, expected):
            continue  # its own guess, not the file's modules
        taken += 1
        assert_close(alone(folder), theirs, atol=1e-5, rtol=1e-5)
    assert taken > 20


def test_a_dropout_of_one(good: Path, expected: Tensor, tmp_path: Path) -> None:
    folder = rewritten(good, tmp_path / "it", lora_dropout=1)
    assert_close(alone(folder), expected, atol=1e-5, rtol=1e-5)
    model = mixture({"it": str(folder)}, base=llama()).train()
    with model.fixed_scalings([1.0]):
        assert_close(logits_of(model), logits_of(llama()), atol=1e-6, rtol=1e-6)


# Folders of other tools: the remedy is followed


def refusal_of(folder: Path | str) -> errors.LoramixError:
    with pytest.raises(errors.LoramixError) as caught:
        alone(folder)
    assert "'it'" in caught.value.received
    return caught.value


def test_a_folder_around_the_adapters(good: Path, expected: Tensor, tmp_path: Path) -> None:
    for step in (5, 90, 100):
        shutil.copytree(good, tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    found = refusal_of(tmp_path / "run")
    assert "'checkpoint-100'" in found.received
    place = re.search(r"Give that folder: '(.+)'\.", found.remedy)
    assert place
    assert_close(alone(place[1]), expected, atol=1e-5, rtol=1e-5)
    found = refusal_of(good / WEIGHTS)
    place = re.search(r"Give its folder, '(.+)'\.", found.remedy)
    assert place
    assert_close(alone(place[1]), expected, atol=1e-5, rtol=1e-5)


def test_weights_without_a_configuration(good: Path, expected: Tensor, tmp_path: Path) -> None:
    folder = rewritten(good, tmp_path / "it")
    patterns = {name: json.loads((folder / CONFIG).read_text())[name] for name in ("rank_pattern", "alpha_pattern")}
    (folder / CONFIG).unlink()
    found = refusal_of(folder)
    assert "configuration" in found.received
    assert "LoraConfig(r=…, lora_alpha=…, target_modules=[…]).save_pretrained(folder)" in found.remedy
    loramix.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, **patterns).save_pretrained(folder)
    assert_close(alone(folder), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_mlx(tmp_path: Path) -> None:
    good = Path(write_expert(tmp_path / "good", llama(), target_modules=ALL))
    expected, folder, again = logits_of(lora(llama(), str(good))), tmp_path / "it", tmp_path / "again"
    folder.mkdir()
    tensors = {
        key.removeprefix(PREFIX).replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): tensor
        for key, tensor in load_file(good / WEIGHTS).items()
    }
    save_file({key: tensor.T.contiguous() for key, tensor in tensors.items()}, folder / "adapters.safetensors")
    parameters = {
        "rank": 4,
        "scale": 2.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"],
    }
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters}))
    found = refusal_of(folder)
    assert "mlx-lm" in found.received
    assert "lora_A.weight = lora_a.T" in found.remedy
    assert "lora_alpha=rank * scale" in found.remedy
    (folder / CONFIG).unlink()
    assert refusal_of(folder).remedy == found.remedy
    saved = load_file(folder / "adapters.safetensors")
    again.mkdir()
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    renamed = {
        f"{PREFIX}{path}.{names[leaf]}": tensor.T.contiguous()
        for key, tensor in saved.items()
        for path, leaf in [key.rsplit(".", 1)]
    }
    save_file(renamed, again / WEIGHTS)
    config = loramix.LoraConfig(r=4, lora_alpha=4 * parameters["scale"], target_modules=parameters["keys"])
    config.save_pretrained(again)
    assert_close(alone(again), expected, atol=1e-5, rtol=1e-5)
    shutil.copy(folder / "adapters.safetensors", again / WEIGHTS)
    assert "mlx-lm's" in refusal_of(again).received


def test_keys_of_kohya(tmp_path: Path) -> None:
    good = Path(write_expert(tmp_path / "good", llama(), target_modules=ALL))
    expected = logits_of(lora(llama(), str(good)))
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(good / WEIGHTS).items():
        path, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        name = "lora_te_" + path.replace(".", "_")
        tensors |= {
            f"{name}.lora_{'down' if part[0] == 'A' else 'up'}.weight": tensor,
            f"{name}.alpha": torch.tensor(8.0),
        }
    folder = rewritten(good, tmp_path / "it")
    save_file(tensors, folder / WEIGHTS)
    found = refusal_of(folder)
    assert "kohya's" in found.received
    assert "lora_A.weight = lora_down.weight" in found.remedy
    paths = {"lora_te_" + path.replace(".", "_"): path for path, _ in llama().named_modules()}
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    renamed = {
        f"{PREFIX}{paths[name]}.{names[part]}": tensor
        for key, tensor in tensors.items()
        for name, _, part in [key.partition(".")]
        if part != "alpha"
    }
    save_file(renamed, folder / WEIGHTS)
    assert_close(alone(folder), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "found", "remedy"),
    [
        ("adapter-f16.gguf", "llama.cpp", "convert_lora_to_gguf.py"),
        ("pytorch_lora_weights.safetensors", "diffusers", "load_lora_weights"),
        ("global_step100", "DeepSpeed", "save_pretrained(folder)"),
        ("pytorch_model_fsdp_0", "FSDP", "FULL_STATE_DICT"),
        ("adapter_model-00001-of-00002.safetensors", "an index is missing", "adapter_model.safetensors.index.json"),
    ],
)
@pytest.mark.parametrize("configured", [False, True])
def test_folders_without_an_adapter_that_can_be_read(
    configured: bool, name: str, found: str, remedy: str, good: Path, tmp_path: Path
) -> None:
    folder = rewritten(good, tmp_path / "it")
    (folder / WEIGHTS).unlink()
    if not configured:
        (folder / CONFIG).unlink()
    (folder / name).write_bytes(b"GGUF")
    caught = refusal_of(folder)
    assert isinstance(caught, errors.CheckpointNotFoundError)
    assert repr(name) in caught.received
    assert found in caught.received
    assert remedy in caught.remedy


def test_parts_that_nobody_gathered(good: Path, tmp_path: Path) -> None:
    folder = rewritten(good, tmp_path / "it")
    save_file({key: torch.empty(0) for key in load_file(folder / WEIGHTS)}, folder / WEIGHTS)
    caught = refusal_of(folder)
    assert isinstance(caught, errors.IncompleteCheckpointError)
    assert "stage3_gather_16bit_weights_on_model_save" in caught.remedy


def test_a_base_model_that_was_moved(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    hf = loramix.AutoPeftModelForCausalLM.base_class
    write_expert(tmp_path / "it", hf.from_pretrained(tmp_path / "base"), target_modules=ALL)
    expected = logits_of(lora(llama(), str(tmp_path / "it")))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(errors.CheckpointNotFoundError) as caught:
        loramix.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "it")
    assert f"base_model_name_or_path={str(tmp_path / 'base')!r}" in caught.value.received
    call = re.search(r"PeftModel\.from_pretrained\((\w+)\.from_pretrained\(…\), '(.+)'\)", caught.value.remedy)
    assert call
    assert call[1] == hf.__name__
    model: Any = loramix.PeftModel.from_pretrained(hf.from_pretrained(tmp_path / "moved"), call[2])
    assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
