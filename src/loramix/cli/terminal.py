"""How commands speak: text and JSON on stdout, errors on stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Generator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from loramix.errors import ConfigurationError, LoramixError

MAX_SEED = 2**32 - 1


def show_error(error: LoramixError) -> None:
    """Print an error's rule, what was received and the remedy to stderr: a panel for people, plain lines for pipes."""
    console = Console(stderr=True, highlight=False)
    lines = (error.rule, f"received: {error.received}", f"remedy: {error.remedy}")
    if not console.is_terminal:
        print(f"{type(error).__name__}: {lines[0]}", *lines[1:], sep="\n  ", file=sys.stderr)
        return
    rule, received, remedy = (Text(line) for line in lines)
    remedy.stylize("bold")
    console.print(Panel(Group(rule, received, remedy), title=type(error).__name__, border_style="red"))


def read_text(given: str) -> str:
    """A text from the command line, or stdin's where it is "-".

    Raises:
        ConfigurationError: bytes that are no text in the encoding of the terminal.
    """
    try:
        text = sys.stdin.read() if given == "-" else given
        text.encode("utf-8")
    except UnicodeError as error:
        raise ConfigurationError(
            "A text given to a command holds whole characters.",
            received=f"bytes that are none: {error}" + (", on stdin" if given == "-" else ""),
            remedy="Convert the text to UTF-8; with another encoding name it in PYTHONIOENCODING.",
        ) from error
    return text


def print_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document, and nothing else, to stdout; what its encoding lacks is escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2, allow_nan=False)
    print(text)


@contextlib.contextmanager
def warnings_as_lines() -> Generator[None]:
    """While this is open, a warning is one line on stderr, once, without the place in the code that it came from."""
    told: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def write_what_stdout_can() -> None:
    """From now on, a character that stdout's encoding lacks is written as "?"."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def ends_where_stdout_ends() -> Generator[None]:
    """Leave with exit code 1, and no traceback, where stdout cannot be written to: its reader has gone, a full disk.

    Raises:
        SystemExit: it cannot.
    """
    try:
        try:
            yield
        finally:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:
            print(f"error: {error}", file=sys.stderr)
        # What is still buffered would fail once more when the interpreter flushes it on leaving.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


@contextlib.contextmanager
def stdout_kept_for_json(wanted: bool) -> Generator[None]:
    """While this is open, and if wanted, whatever is printed to stdout goes to stderr instead."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield
