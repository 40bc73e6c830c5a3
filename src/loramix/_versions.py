"""loramix's own version, and the oldest torch and transformers that it runs on.

They are checked when loramix is imported, and neither is loaded for that. What differs between the versions from there
on is in `loramix._compat`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping

from loramix.errors import VersionError

__version__ = "0.1.0"

LOWEST: Mapping[str, tuple[int, int]] = {"torch": (2, 8), "transformers": (5, 0)}
"""Package -> its oldest version; pyproject.toml declares the same bounds."""


def check_versions(lowest: Mapping[str, tuple[int, int]] = LOWEST) -> None:
    """Refuse installed packages that are too old; one without metadata is not judged.

    Raises:
        VersionError: naming the versions that are needed, those that are installed, and the pip command.
    """
    old: dict[str, str] = {}
    for package, bound in lowest.items():
        installed = installed_version(package)
        if installed is not None and release_of(installed) < bound:
            old[package] = installed
    if old:
        needed = {package: f"{package}>={'.'.join(map(str, lowest[package]))}" for package in old}
        raise VersionError(
            f"loramix needs {' and '.join(needed.values())}.",
            received=" and ".join(f"{package} {installed}" for package, installed in old.items()) + ".",
            remedy="pip install " + " ".join(f'"{text}"' for text in needed.values()),
        )


def installed_version(package: str) -> str | None:
    """The version in a package's metadata; None if it is not installed, or has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as "2.8.0a0+git1234"."""
    major, minor = (int(number) for number in re.findall(r"\d+", version + ".0")[:2])
    return major, minor
