"""What the command line's tests pass around: the folders that commands are given, and what a command left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    base: Path
    mixture: Path
    experts: dict[str, Path]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
