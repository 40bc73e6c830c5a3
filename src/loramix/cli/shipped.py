"""`demo` as the name of the mixture that ships with loramix."""

from __future__ import annotations

from pathlib import Path

SHIPPED = "demo"


def is_shipped(mixture: str) -> bool:
    """Whether an argument names the mixture that ships with loramix; a folder called `demo` takes precedence."""
    return mixture == SHIPPED and not Path(mixture).is_dir()
