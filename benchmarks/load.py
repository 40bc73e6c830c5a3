"""Loading from a folder: the base model alone, and the base model with a mixture put on it.

Loading maps a base model's file into memory and reads none of it, while experts are stacked, which reads theirs. So
loading is also timed with every parameter read once after it, where the bytes of the files are a limit.

Both mixtures are loaded from the same files, written by loramix. PEFT drops the router's tensors when it saves, but
loads those that are there; it wants the experts' folders as whole paths.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from transformers import AutoModelForCausalLM

from benchmarks.models import Models
from loramix import PeftModel
from loramix.timing import Contender, Measurement, interleave


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Two measurements: loaded, and loaded and read; the limit of the second counts the bytes of the files."""
    with tempfile.TemporaryDirectory() as name:
        base, ours, theirs = (Path(name) / part for part in ("base", "loramix", "peft"))
        models.base.save_pretrained(base)
        models.loramix.save_pretrained(ours)
        _with_whole_paths(ours, theirs)

        def load_base(**config: Any) -> Any:
            return AutoModelForCausalLM.from_pretrained(base, **config)

        def load_peft() -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers renames
                return peft.PeftModel.from_pretrained(load_base(use_cache=False), str(theirs))  # as PEFT wants it

        loads: dict[str, Callable[[], Any]] = {
            "base": load_base,
            "loramix": lambda: PeftModel.from_pretrained(load_base(), ours),
            "PEFT": load_peft,
        }
        loaded = interleave([Contender(name, load) for name, load in loads.items()], rounds)
        read = interleave([Contender(name, lambda load=load: _read(load())) for name, load in loads.items()], rounds)
        limit = 1 + _bytes(ours) / _bytes(base)
    return [Measurement("load", loaded), Measurement("load, and read every parameter once", read, limit)]


def _read(model: Any) -> None:
    for parameter in model.parameters():
        parameter.sum()


def _with_whole_paths(folder: Path, copy: Path) -> None:
    shutil.copytree(folder, copy)
    file = copy / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["adapters"] = {name: str(copy / path) for name, path in config["adapters"].items()}
    file.write_text(json.dumps(config), encoding="utf-8")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
