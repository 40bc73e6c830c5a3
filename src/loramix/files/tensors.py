"""Files of tensors: safetensors, read and written; PyTorch pickles, read without executing code in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from loramix.errors import CorruptCheckpointError, SaveError

WRITER = "loramix"
_LFS_POINTER = b"version https://git-lfs"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU, in the file's dtypes; safetensors are memory-mapped, not copied.

    Raises:
        CorruptCheckpointError: an empty or truncated file, a Git LFS pointer, or other content than named tensors.
    """
    try:
        start = _start_of(path)
        if not start or start == _LFS_POINTER:
            raise _corrupt(path, "an empty file" if not start else "a Git LFS pointer instead of the file")
        return _read_pickle(path) if path.suffix == ".bin" else _read_safetensors(path)
    except CorruptCheckpointError:
        raise
    # For a damaged file, torch.load raises exceptions of nearly any class.
    except Exception as error:
        raise _corrupt(path, f"{type(error).__name__}: {error}") from error


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds an infinite number or NaN."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file, with the metadata that PEFT and transformers expect.

    Args:
        path: the file.
        tensors: by name, on any device.
        **metadata: further entries of the file's metadata.

    Raises:
        OSError: the file could not be written.
        SaveError: a tensor without data, on the meta device.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(_own_storages(tensors), path, metadata=metadata | {"format": "pt", "writer": WRITER})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)  # safetensors makes the file readable for its owner only


def is_ours(path: Path) -> bool:
    """Whether `write_tensors` wrote the file; False if it cannot be read."""
    return metadata_of(path).get("writer") == WRITER


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it cannot be read."""
    try:
        with _open(path) as file:
            return cast("dict[str, str] | None", file.metadata()) or {}
    except (OSError, SafetensorError):
        return {}


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _open(path) as file:
        return {key: file.get_tensor(key) for key in cast("list[str]", file.keys())}


def _open(path: Path) -> Any:
    return safe_open(os.fspath(path), framework="pt", device="cpu")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise _corrupt(path, f"a {type(content).__name__}")
    tensors = cast("dict[Any, Any]", content)
    for key, value in tensors.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise _corrupt(path, f"{key!r}, a {type(value).__name__}")
    return tensors


def _own_storages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors requires; copied only if they do."""
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise SaveError(
                "Only tensors that are in memory can be saved.",
                received=f"{key}, which accelerate has offloaded",
                remedy="bring the weights back first: accelerate.hooks.remove_hook_from_module(model, recurse=True)",
            )
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        packed[key] = tensor
    return packed


def _corrupt(path: Path, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "A weights file must hold tensors by name.",
        received=f"{path}: {found}",
        remedy="Download it again (with `git lfs pull` for a clone), or save it again.",
    )
