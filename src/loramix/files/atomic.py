"""Atomic saving of several files: afterwards the folder holds either all new files or all old ones.

A save may stop at any point (an exception, a full disk, a killed process, a power cut). It has three steps:

1. Write every new file under a temporary name in the folder of its final name, and flush it to disk. If the save
   stops here, the folder holds the old state. An exception removes the temporary files; those of a killed process are
   removed by the next save of the same file.
2. Rename the journal into place. This rename is the commit: before it the old state is in force, after it the new one
   (`loramix.files.journal` says how readers find it).
3. Delete the files that the new state does not have, rename every temporary file to its final name in the given
   order, and delete the journal. If the save stops here, readers find the new state through the journal, and the next
   save finishes this step first.

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
from functools import partial
from pathlib import Path

from loramix.errors import CheckpointError, SaveError
from loramix.files.journal import JOURNAL_NAME, PREFIX, Journal, read_journal

Writer = Callable[[Path], None]

_OLD = "the earlier state is in place"
_NEW = "the new state is complete and is what loramix loads, partly still under temporary names"


def save_files(folder: Path, writers: Mapping[str, Writer], removed: Iterable[str] = ()) -> None:
    """Save files into a folder, all or none; missing folders are created.

    Args:
        folder: the folder.
        writers: path relative to the folder, with "/" -> a function that writes the file to the path it is given. The
            files are renamed to their final names in this order.
        removed: relative paths of files that the new state does not have.

    Raises:
        SaveError: with the cause; the message says which state is in force.
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
    """Save one UTF-8 text file as `save_files` does: the old file is replaced by the whole new one, or stays.

    Raises:
        SaveError: with the cause; the message says which file is in force.
    """
    save_files(path.parent, {path.name: text_writer(text)})


def text_writer(text: str) -> Writer:
    """A writer of a UTF-8 text file; line ends stay as they are."""
    return partial(_write_text, text=text)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def finish_interrupted(folder: Path) -> None:
    """Finish a save of this folder, or of its parent, that stopped after its commit.

    Raises:
        SaveError: with the cause.
    """
    try:
        for interrupted in (folder.parent, folder):
            _finish(interrupted, read_journal(interrupted))
    except (OSError, CheckpointError) as error:
        raise _save_error(folder, error, _OLD) from error


def _prepare(folder: Path, writers: Mapping[str, Writer]) -> tuple[dict[str, str], list[Path]]:
    """Step 1.

    Returns:
        final name -> temporary name, relative to the folder; and the folders that were created.
    """
    token = uuid.uuid4().hex[:8]
    temporaries: dict[str, str] = {}
    made: list[Path] = []
    try:
        for place, write in writers.items():
            path = folder / place
            _make_folder(path.parent, made)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder is in the place of the file", str(path))
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
    """Step 3. Deleting the journal may fail: it has no effect once every temporary file is renamed."""
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
    """Delete temporary files of this file that a killed process left before its commit."""
    for abandoned in path.parent.glob(f"{PREFIX}????????-{glob.escape(path.name)}"):
        abandoned.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames durable, on platforms and file systems where a folder can be flushed."""
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
