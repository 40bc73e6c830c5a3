"""Which of a folder's files are in force after an interrupted save.

A save (see `loramix.files.atomic`) first writes every new file under a temporary name, then a journal: a JSON object
with `files`, final name -> temporary name, and `removed`, the files that the new state does not have. All paths are
relative to the saved folder. While the journal exists the new state is in force: where a temporary file exists it is
the file, and where it does not it has already been renamed. Readers follow this rule and write nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from loramix.errors import CorruptCheckpointError

PREFIX = ".loramix-"
JOURNAL_NAME = f"{PREFIX}journal.json"


@dataclass(frozen=True)
class Journal:
    """The content of a journal; empty if there is no journal."""

    files: dict[str, str] = field(default_factory=dict[str, str])
    removed: list[str] = field(default_factory=list[str])

    def to_json(self) -> str:
        """The text of the journal file."""
        return json.dumps(asdict(self), indent=2)


def current(place: Path) -> Path:
    """The file in force for a path: the path itself, unless a journal names a temporary file for it.

    The journal is in the saved folder: the folder of `place` or, for an expert of a mixture, the one above.

    Raises:
        CorruptCheckpointError: a journal that cannot be read.
    """
    for folder in (place.parent, place.parent.parent):
        temporary = read_journal(folder).files.get(place.relative_to(folder).as_posix())
        if temporary is not None and (folder / temporary).is_file():
            return folder / temporary
    return place


def read_journal(folder: Path) -> Journal:
    """The journal of a folder.

    Raises:
        CorruptCheckpointError: a journal that cannot be read, or that `save_files` cannot have written.
    """
    path = folder / JOURNAL_NAME
    if not path.is_file():
        return Journal()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        journal = Journal(dict(content["files"]), list(content["removed"]))
        _check(journal)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(
            "The journal of an interrupted save must be readable.",
            received=f"{path}: {error!r}",
            remedy=f"Delete {JOURNAL_NAME}, then check which of the folder's files are the ones you want.",
        ) from error
    return journal


def _check(journal: Journal) -> None:
    """A journal must not make a save move or delete files outside its folder."""
    for place in (*journal.files, *journal.removed):
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\\" in place:
            raise ValueError(f"{place!r} is not inside the folder")
    for place, temporary in journal.files.items():
        written, final = PurePosixPath(temporary), PurePosixPath(place)
        if written.parent != final.parent or not written.name.startswith(PREFIX) or "\\" in temporary:
            raise ValueError(f"{temporary!r} is no temporary of {place!r}")
