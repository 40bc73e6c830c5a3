"""Reading a file that holds one JSON object."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loramix.errors import AdapterNameError, CorruptCheckpointError


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that holds one JSON object with no key twice.

    Raises:
        CorruptCheckpointError: not JSON, not an object, or a key twice.
        AdapterNameError: two experts of one name under `adapters`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_JsonObject)
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(
            "A configuration file must be readable JSON.",
            received=f"{os.fspath(path)}: {error}",
            remedy="Save or download it again.",
        ) from error
    if not isinstance(content, _JsonObject):
        raise CorruptCheckpointError(
            "A configuration file must hold a JSON object.",
            received=f"{os.fspath(path)}: a {type(content).__name__}",
            remedy="Save or download it again.",
        )
    adapters = content.get("adapters")
    if isinstance(adapters, _JsonObject) and adapters.repeated:
        raise AdapterNameError(
            "Two experts must not have one name.",
            received=f"{', '.join(map(repr, adapters.repeated))} twice under adapters in {os.fspath(path)}",
            remedy="Rename one of them in that file.",
        )
    if content.repeated:
        raise CorruptCheckpointError(
            "A configuration file must hold each key once.",
            received=f"{os.fspath(path)}: {', '.join(map(repr, content.repeated))} twice",
            remedy="Remove one of the two.",
        )
    return dict(content)


class _JsonObject(dict[str, Any]):
    """A JSON object that knows which of its keys the text repeats."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = sorted({name for name in names if names.count(name) > 1})
