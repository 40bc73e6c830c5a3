"""More than one process, on CPU with gloo: the same losses, the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loramix import PeftModel
from support.training_files import Files, write_lines

pytestmark = pytest.mark.slow  # each run is several processes that load everything anew
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
CHANGES: dict[str, Any] = {"objectives": {"z_loss": 0.1, "supervised": 0.1}}


COMMAND = ("-m", "loramix.cli")
FSDP_COMMAND = (str(Path(__file__).parents[1] / "support" / "fsdp_on_cpu.py"),)


def launch(
    launcher: list[str], files: Files, output: Path, batch: int, *, command: Sequence[str] = COMMAND, **changes: Any
) -> Any:
    """Run `loramix train --json` under a launcher, on texts of one length: a mean of means is then the mean of all."""
    output.parent.mkdir(exist_ok=True)
    run = output.parent / f"{output.name}.yaml"
    texts = [json.loads(line) for line in files.data.read_text().splitlines()]
    rows = [row | {"text": f"{row['text']:<24}"} for row in texts]
    data = str(write_lines(output.parent / "data.jsonl", rows))
    trainer = {"per_device_train_batch_size": batch}
    settings = files.settings(output, trainer=trainer, **CHANGES, data={"train": data, "eval": data}, **changes)
    run.write_text(yaml.safe_dump(settings, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *command, "train", str(run), "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-20_000:]  # each process has its own trace
    return done


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
    launch(torchrun(1), files, output, 2)
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
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files.base), output / "checkpoint-4")
    assert loaded.expert_names == list(files.experts)


LAUNCHERS = {
    "torchrun": torchrun(2),
    "accelerate": ["accelerate.commands.launch", "--main_process_port", "0", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ddp_is_the_run_of_one_process(launcher: str, alone: Path, files: Files, tmp_path: Path) -> None:
    done = launch(LAUNCHERS[launcher], files, tmp_path / "run", 1)
    compare(tmp_path / "run", alone, files)
    assert json.loads(done.stdout) == {
        "mixture": str(tmp_path / "run" / "mixture"),
        "evaluation": json.loads((tmp_path / "run" / "evaluation.json").read_text()),
    }
    assert files_of(tmp_path / "run") == files_of(alone)


@pytest.mark.parametrize("router", ["linear", "static"])
def test_ddp_of_a_router_of_one_pass_is_the_run_of_one_process(router: str, files: Files, tmp_path: Path) -> None:
    """The other kinds of one pass have nothing to train."""
    for processes, batch in ((1, 2), (2, 1)):
        launch(torchrun(processes), files, tmp_path / str(processes) / "run", batch, mixture={"router": router})
    compare(tmp_path / "2" / "run", tmp_path / "1" / "run", files)
    assert files_of(tmp_path / "2" / "run") == files_of(tmp_path / "1" / "run")


@pytest.fixture
def fsdp2(tmp_path: Path) -> list[str]:
    config = tmp_path / "fsdp2.yaml"
    config.write_text(yaml.safe_dump(FSDP2))
    return ["accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(config)]


def test_fsdp2_is_the_run_of_one_process(fsdp2: list[str], alone: Path, files: Files, tmp_path: Path) -> None:
    done = launch(fsdp2, files, tmp_path / "run", 1, command=FSDP_COMMAND)
    assert done.stderr.count("DistributedType.FSDP sharded=True") == 2
    compare(tmp_path / "run", alone, files)
    assert json.loads(done.stdout)["evaluation"]["rows"]["X-LoRA"]["all"]["tokens"] > 0
    its_own = {"pytorch_model_fsdp.bin", "optimizer.bin"}  # what the trainer resumes a sharded run from
    assert files_of(tmp_path / "run") == (files_of(alone) | its_own) - {"optimizer.pt"}


def test_fsdp2_trains_float32_experts_beside_a_bfloat16_base(fsdp2: list[str], files: Files, tmp_path: Path) -> None:
    mixture = {"xlora_depth": 1, "use_trainable_adapters": True}
    launch(fsdp2, files, tmp_path / "run", 1, command=FSDP_COMMAND, dtype="bfloat16", mixture=mixture)
    moved = load_file(tmp_path / "run" / "mixture" / "math" / "adapter_model.safetensors")
    started = load_file(Path(files.experts["math"]) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in moved.values()} == {torch.float32}
    assert any(not torch.equal(tensor, started[name]) for name, tensor in moved.items())
