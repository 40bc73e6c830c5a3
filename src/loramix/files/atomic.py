"""Saving several files as one: afterwards the folder holds all of the new ones, or all of the old ones.

The law, for every point at which a save can stop (an exception, a full disk, a killed process, a power cut):

1. Write every new file, complete and flushed to disk, under a temporary name beside its place. Stopped here, the
   folder holds the old state; an exception also removes the temporaries, and what a killed process leaves of them the
   next save of the same file removes.
2. Rename the journal into place. This one rename is the commit: before it the old state is in force, after it the
   new one (`loramix.files.journal` has the rule by which readers find it).
3. Rename every temporary to its place, in the given order, delete what the new state no longer has, and then the
   journal. Stopped here, readers see the new state through the journal, and the next save finishes this step first.

No file is opened for writing under its final name: tensors mapped from the old files stay valid, and a link is
replaced rather than followed. Files that are not part of the save are neither read nor written.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from loramix.errors import CheckpointError, SaveError
from loramix.files.journal import JOURNAL_NAME, PREFIX, Journal, read_journal

Writer = Callable[[Path], None]

_OLD = "the earlier state is in place"
_NEW = "the new state is complete and is what loramix loads, partly still under temporary names"


def save_files(folder: Path, writers: Mapping[str, Writer], removed: Iterable[str] = ()) -> None:
    """Save files into a folder by the law above; the folder and its subfolders are made where they are missing.

    Args:
        folder: where.
        writers: path relative to the folder, with "/" -> what writes the file to the path it is given. They are
            renamed to their places in this order.
        removed: relative paths of files that the new state does not have.

    Raises:
        SaveError: with the cause; its text says which state is in force.
    """
    finish_interrupted(folder)
    try:
        temporaries, made = _prepare(folder, writers)
    except (OSError, CheckpointError) as error:
        raise _save_error(folder, error, _OLD) from error
    journal = Journal(temporaries, list(removed))
    try:
        _commit(folder, journal)
    except BaseException as error:
        _discard(folder, (JOURNAL_NAME, *temporaries.values()), made)
        if isinstance(error, OSError):
            raise _save_error(folder, error, _OLD) from error
        raise
    try:
        _finish(folder, journal)
    except OSError as error:
        raise _save_error(folder, error, _NEW) from error


def save_text(path: Path, text: str) -> None:
    """Save one text file, UTF-8, by the same law.

    Raises:
        SaveError: with the cause; its text says which state is in force.
    """
    save_files(path.parent, {path.name: text_writer(text)})


def text_writer(text: str) -> Writer:
    """What writes a text, UTF-8 with its line ends as they are, to the path that it is given."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", newline="\n")

    return write


def finish_interrupted(folder: Path) -> None:
    """Finish a save of this folder, or of the one above, that was stopped after its commit.

    Raises:
        SaveError: with the cause.
    """
    try:
        for interrupted in (folder.parent, folder):
            _finish(interrupted, read_journal(interrupted))
    except (OSError, CheckpointError) as error:
        raise _save_error(folder, error, _OLD) from error


def _prepare(folder: Path, writers: Mapping[str, Writer]) -> tuple[dict[str, str], list[Path]]:
    """Step 1: the temporaries by place, and the folders made for them."""
    token = uuid.uuid4().hex[:8]
    temporaries: dict[str, str] = {}
    made: list[Path] = []
    try:
        for place, write in writers.items():
            path = folder / place
            _make_folder(path.parent, made)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder lies where the file belongs", str(path))
            _discard_abandoned(path)
            temporary = path.with_name(f"{PREFIX}{token}-{path.name}")
            temporaries[place] = temporary.relative_to(folder).as_posix()
            write(temporary)
            _flush(temporary)
        for parent in {path.parent for path in (*made, *map(folder.joinpath, writers))}:
            _flush_folder(parent)
    except BaseException:
        _discard(folder, temporaries.values(), made)
        raise
    return temporaries, made


def _commit(folder: Path, journal: Journal) -> None:
    """Step 2."""
    draft = folder / f"{PREFIX}{uuid.uuid4().hex[:8]}-journal"
    try:
        draft.write_text(journal.to_json(), encoding="utf-8")
        _flush(draft)
        draft.replace(folder / JOURNAL_NAME)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _finish(folder: Path, journal: Journal) -> None:
    """Step 3. Once every temporary is renamed the journal says nothing, so that deleting it may fail."""
    waiting = [place for place, temporary in journal.files.items() if (folder / temporary).is_file()]
    if waiting:
        _flush_folder(folder)
        for place in journal.removed:
            (folder / place).unlink(missing_ok=True)
    for place in waiting:
        (folder / journal.files[place]).replace(folder / place)
    for parent in {(folder / place).parent for place in waiting}:
        _flush_folder(parent)
    with contextlib.suppress(OSError):
        (folder / JOURNAL_NAME).unlink(missing_ok=True)


def _make_folder(folder: Path, made: list[Path]) -> None:
    if not folder.is_dir():
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        made.extend(missing)
        folder.mkdir(parents=True, exist_ok=True)


def _discard(folder: Path, temporaries: Iterable[str], made: Iterable[Path]) -> None:
    for temporary in temporaries:
        with contextlib.suppress(OSError):
            (folder / temporary).unlink(missing_ok=True)
    for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()


def _discard_abandoned(path: Path) -> None:
    """Delete what a killed process left behind of a save of this file that it never committed."""
    for abandoned in path.parent.glob(f"{PREFIX}????????-{glob.escape(path.name)}"):
        abandoned.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames durable; file systems and platforms without this notion have nothing to flush."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _save_error(folder: Path, error: Exception, state: str) -> SaveError:
    return SaveError(
        "A save writes every file of the folder, or none.",
        received=f"{type(error).__name__}: {error} in {str(folder)!r}; {state}",
        remedy="Give a folder with room and permission to write, and save again.",
    )
