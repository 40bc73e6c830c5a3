"""Files that hold one JSON object."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, cast

from loramix.errors import AdapterNameError, CorruptCheckpointError
from loramix.files.atomic import save_text

_Repeats = tuple[dict[str, Any], list[str]]  # an object, and its keys that occur more than once


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object, in UTF-8 or, as some editors and shells save it, in UTF-16.

    Repeated keys are refused, at any depth.

    Raises:
        CorruptCheckpointError: not JSON, not an object, or a repeated key.
        AdapterNameError: a repeated name under `adapters`.
    """
    repeats: list[_Repeats] = []
    try:
        content = json.loads(_text_of(Path(path)), object_pairs_hook=functools.partial(_as_object, repeats))
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(path, "be readable JSON in utf-8 or utf-16", str(error)) from error
    if not isinstance(content, dict):
        raise _corrupt(path, "hold a JSON object", f"a {type(content).__name__}")
    values = cast("dict[str, Any]", content)
    for where, names in repeats:
        if where is values.get("adapters"):
            raise AdapterNameError(
                "Two experts must not have one name.",
                received=f"{', '.join(map(repr, names))} twice under adapters in {os.fspath(path)}",
                remedy="Rename one of them in that file.",
            )
        raise _corrupt(path, "hold each key once", f"{', '.join(map(repr, names))} twice")
    return values


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return path.read_text(encoding="utf-16")


def _as_object(repeats: list[_Repeats], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeats.append((result, [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]))
    return result


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write one JSON object, indented by 2; readers find the old file or the whole new one.

    Raises:
        SaveError: the file could not be written; an earlier one is still in place.
    """
    save_text(Path(path), json.dumps(content, indent=2) + "\n")


def _corrupt(path: str | os.PathLike[str], rule: str, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"A configuration file must {rule}.",
        received=f"{os.fspath(path)}: {found}",
        remedy="Save or download it again, or correct it.",
    )
