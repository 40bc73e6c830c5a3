"""Which of a saved folder's files are in force when a save was interrupted.

A save (see `loramix.files.atomic`) writes every new file under a temporary name beside its place, and then a
journal: a JSON object with `files`, place -> temporary, and `removed`, the places that the new state does not have;
all paths are relative to the saved folder. With the journal in place the new state is in force: a temporary that
still lies there is the file, and one that is gone has already been renamed to its place. A reader needs no more than
this rule, and writes nothing.
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
    """The journal's content; empty where there is none."""

    files: dict[str, str] = field(default_factory=dict[str, str])
    removed: list[str] = field(default_factory=list[str])

    def to_json(self) -> str:
        """The text of the journal file."""
        return json.dumps(asdict(self), indent=2)


def current(place: Path) -> Path:
    """The path of the file in force for `place`: `place` itself, unless a journal names a temporary for it.

    The journal lies in the saved folder, which holds `place` or, for an expert of a mixture, its parent.

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
        CorruptCheckpointError: a journal that cannot be read, or that no save of ours can have written.
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
    """A journal from elsewhere must not make a save move or delete files outside its folder."""
    for place in (*journal.files, *journal.removed):
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\\" in place:
            raise ValueError(f"{place!r} is not inside the folder")
    for place, temporary in journal.files.items():
        written, wanted = PurePosixPath(temporary), PurePosixPath(place)
        if written.parent != wanted.parent or not written.name.startswith(PREFIX) or "\\" in temporary:
            raise ValueError(f"{temporary!r} is no temporary of {place!r}")
