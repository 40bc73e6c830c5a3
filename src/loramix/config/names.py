"""Names of experts: each is the name of a folder in the saved mixture, on any file system."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from loramix.errors import AdapterNameError

_FORBIDDEN = re.compile(r'[/\\<>:"|?*\x00-\x1f\x7f]')
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
_RESERVED = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "model.safetensors"}
_RESERVED_PREFIX = ".loramix"
_REMEDY = "Use letters, digits, '-' and '_', for example 'math'."


def check_expert_names(names: Iterable[object]) -> None:
    """Check that every name can be the name of a folder, and that no two names clash.

    Names that differ only in case or in the encoding of accents clash: on some file systems they are one folder.

    Raises:
        AdapterNameError: naming the first name, or the first pair, that breaks the rule.
    """
    seen: dict[str, object] = {}
    for name in names:
        fault = _fault_of(name)
        if fault:
            raise AdapterNameError(
                "An expert's name must be usable as a folder's name.",
                received=f"{name!r}, which {fault}",
                remedy=_REMEDY,
            )
        key = _folded(str(name))
        if key in seen:
            raise AdapterNameError(
                "Two experts must not share a folder, also where upper and lower case are one.",
                received=f"{seen[key]!r} and {name!r}",
                remedy="Rename one of them.",
            )
        seen[key] = name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _fault_of(name: object) -> str | None:
    if not isinstance(name, str):
        return "is no string"
    if not name:
        return "is empty"
    if name in (".", ".."):
        return "means another folder"
    forbidden = _FORBIDDEN.search(name)
    if forbidden:
        return f"contains {forbidden.group()!r}"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a space, or ends with a dot"
    folded = _folded(name)
    if folded in _RESERVED or folded.startswith(_RESERVED_PREFIX) or folded.partition(".")[0] in _DEVICES:
        return "is reserved"
    try:
        too_long = len(name.encode()) > 255
    except UnicodeEncodeError:
        return "cannot be written as UTF-8"
    return "is longer than 255 bytes" if too_long else None
