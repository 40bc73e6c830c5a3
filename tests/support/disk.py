"""What lies on disk, to compare before and after; and experts with something wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Each file's content and time of change, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def edited(folder: str | Path, copy: Path, **fields: object) -> Path:
    """A copy whose configuration has other values."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | fields))
    return copy


def damaged(folder: str | Path, copy: Path, name: str, content: bytes) -> Path:
    """A copy with another content of one file."""
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    return copy


def truncated(folder: str | Path, copy: Path) -> Path:
    """A copy whose weights end too early."""
    return damaged(folder, copy, WEIGHTS, (Path(folder) / WEIGHTS).read_bytes()[:-64])


def without(folder: str | Path, copy: Path, part: str) -> Path:
    """A copy without the tensors whose name contains this."""
    shutil.copytree(folder, copy)
    tensors = {name: tensor for name, tensor in load_file(copy / WEIGHTS).items() if part not in name}
    save_file(tensors, copy / WEIGHTS)
    return copy
