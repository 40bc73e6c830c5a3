"""Files of tensors: safetensors, read and written; PyTorch pickles, read without executing code in them.

Files that loramix writes say so in their metadata, which PEFT does not look at:

    writer           "loramix"
    loramix_version  the version that wrote the file
    loramix_format   `FORMAT`: raised when a file is written that an older loramix would misread
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from loramix._versions import __version__
from loramix.errors import CheckpointError, CorruptCheckpointError, SaveError

WRITER = "loramix"
FORMAT = 1
_LFS_POINTER = b"version https://git-lfs"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OURS = {"format": "pt", "writer": WRITER, "loramix_version": __version__, "loramix_format": str(FORMAT)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU, in the file's dtypes; safetensors are memory-mapped, not copied.

    Raises:
        CorruptCheckpointError: an empty or truncated file, a Git LFS pointer, or other content than named tensors.
        CheckpointError: a file of a newer loramix, in a format that this one does not know.
    """
    try:
        start = _start_of(path)
        if not start or start == _LFS_POINTER:
            raise _corrupt(path, "an empty file" if not start else "a Git LFS pointer instead of the file")
        return _read_pickle(path) if path.suffix in (".bin", ".pt") else _read_safetensors(path)
    except CheckpointError:
        raise
    # For a damaged file, torch.load raises exceptions of nearly any class.
    except Exception as error:
        raise _corrupt(path, f"{type(error).__name__}: {error}") from error


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds an infinite number or NaN."""
    return all(_is_finite(tensor) for tensor in tensors)


def _is_finite(tensor: Tensor) -> bool:
    """A finite sum has finite terms, and is one pass over them; a sum may also overflow."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


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
        save_file(_own_storages(tensors), path, metadata=metadata | _OURS)
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
    """Every tensor as a view of one memory map: safetensors checks the file, and reads tensors of rarer dtypes.

    Source: the format's description, https://github.com/huggingface/safetensors#format.
    """
    with _open(path) as file:
        _check_format(path, cast("dict[str, str] | None", file.metadata()) or {})
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header: dict[str, Any] = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        storage = torch.UntypedStorage.from_file(os.fspath(path), False, path.stat().st_size)
        found: dict[str, Tensor] = {}
        for key, entry in header.items():
            dtype = _DTYPES.get(entry["dtype"])
            start = 8 + length + entry["data_offsets"][0]
            if dtype is None or start % dtype.itemsize:
                found[key] = file.get_tensor(key)
            else:
                empty: Any = torch.empty(0, dtype=dtype)
                found[key] = empty.set_(storage, start // dtype.itemsize, entry["shape"])
    return found


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    saved = metadata.get("loramix_format", "0")
    if metadata.get("writer") == WRITER and saved.isdecimal() and int(saved) > FORMAT:
        version = metadata.get("loramix_version", "newer than this one")
        raise CheckpointError(
            f"loramix {__version__} reads files up to format {FORMAT} of loramix.",
            received=f"{path}: format {saved}, saved by loramix {version}",
            remedy=f'pip install "loramix>={version}"',
        )


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
    return {key: tensor.detach() for key, tensor in tensors.items()}


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
