"""`demo`, where a command takes a mixture: the one that ships inside the package."""

from __future__ import annotations

from pathlib import Path

SHIPPED = "demo"


def is_shipped(mixture: str) -> bool:
    """Whether a word on the command line means the mixture that ships; a folder of that name goes before it."""
    return mixture == SHIPPED and not Path(mixture).is_dir()
