"""More than one process, on CPU with gloo: the same losses, the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loramix import PeftModel
from training.conftest import Files

FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_reshard_after_forward": True,
    },
}


def launch(command: list[str], files: Files, output: Path, **trainer: Any) -> None:
    """Run `loramix train` under a launcher."""
    run = output.parent / f"{output.name}.yaml"
    run.write_text(yaml.safe_dump(files.settings(output, trainer=trainer), sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "loramix.cli", "train", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def torchrun(processes: int) -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def losses(output: Path) -> list[float]:
    """The loss of each step, from the last checkpoint."""
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def alone(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, with the same number of texts in a step."""
    output = tmp_path_factory.mktemp("alone") / "run"
    launch(torchrun(1), files, output, per_device_train_batch_size=2)
    return output


def files_of(output: Path) -> set[str]:
    """What a checkpoint is made of, the random states of each process aside."""
    folder = output / "checkpoint-4"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("rng_state")}


def compare(output: Path, alone: Path, files: Files) -> None:
    assert losses(output) == pytest.approx(losses(alone), rel=1e-4)
    one, other = (load_file(folder / "mixture" / "adapter_model.safetensors") for folder in (output, alone))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=2e-3, rtol=1e-2)
    assert files_of(output) == files_of(alone)
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files.base), output / "checkpoint-4")
    assert loaded.expert_names == list(files.experts)


LAUNCHERS = {
    "torchrun": torchrun(2),
    "accelerate": ["accelerate.commands.launch", "--main_process_port", "0", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ddp_is_the_run_of_one_process(launcher: str, alone: Path, files: Files, tmp_path: Path) -> None:
    launch(LAUNCHERS[launcher], files, tmp_path / "run", per_device_train_batch_size=1)
    compare(tmp_path / "run", alone, files)


def test_fsdp2_is_the_run_of_one_process(alone: Path, files: Files, tmp_path: Path) -> None:
    config = tmp_path / "fsdp2.yaml"
    config.write_text(yaml.safe_dump(FSDP2))
    command = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(config)]
    launch(command, files, tmp_path / "run", per_device_train_batch_size=1)
    compare(tmp_path / "run", alone, files)
