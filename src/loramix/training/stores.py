"""Where the hidden states of the scaling pass are kept, by the keys of their texts: in memory, or in a file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from loramix.errors import ConfigurationError


class MemoryStore:
    """Hidden states in memory, by the keys of their texts."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def write(self, key: bytes, hidden: Tensor) -> bool:
        self._kept[key] = hidden.clone()
        return True

    def read(self, key: bytes) -> Tensor | None:
        return self._kept.get(key)

    def clear(self) -> None:
        self._kept.clear()

    close = clear


@dataclass(frozen=True)
class _Place:
    start: int
    stop: int
    shape: torch.Size
    dtype: torch.dtype


class FileStore:
    """Hidden states in an unnamed temporary file, which ends with the process."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder, prefix=".loramix-scaling-pass-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigurationError(
                "The cache of the scaling pass lies in a folder that can be written.",
                received=f"folder={str(folder)!r}: {error}",
                remedy="Name another folder, or keep the hidden states in memory with folder=None.",
            ) from error
        self._file = cast("BinaryIO", file)
        self._places: dict[bytes, _Place] = {}
        self._end = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def write(self, key: bytes, hidden: Tensor) -> bool:
        """Write them; False if the disk is full."""
        place = _Place(self._end, self._end + hidden.nbytes, hidden.shape, hidden.dtype)
        try:
            self._file.seek(place.start)
            if self._file.write(hidden.view(torch.uint8).numpy().tobytes()) < hidden.nbytes:
                return False
        except OSError:
            return False
        self._places[key], self._end = place, place.stop
        return True

    def read(self, key: bytes) -> Tensor | None:
        place = self._places.get(key)
        if place is None:
            return None
        if place.start == place.stop:
            return torch.zeros(place.shape, dtype=place.dtype)
        self._file.seek(place.start)
        raw = bytearray(self._file.read(place.stop - place.start))
        return torch.frombuffer(raw, dtype=place.dtype).view(place.shape)

    def clear(self) -> None:
        self._places.clear()
        self._end = 0

    def close(self) -> None:
        self.clear()
        self._file.close()
