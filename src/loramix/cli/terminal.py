"""Output of the commands: text and JSON on stdout, errors and warnings on stderr."""

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
    """A text from the command line, or from stdin if it is "-".

    Raises:
        ConfigurationError: bytes that are no text in the encoding of the terminal.
    """
    try:
        text = sys.stdin.read() if given == "-" else given
        text.encode("utf-8")
    except UnicodeError as error:
        raise ConfigurationError(
            "A text given to a command is valid in its encoding.",
            received=f"invalid bytes: {error}" + (", on stdin" if given == "-" else ""),
            remedy="Convert the text to UTF-8; with another encoding name it in PYTHONIOENCODING.",
        ) from error
    return text


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document to stdout; characters that its encoding lacks are escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2, allow_nan=False)
    print(text)


@contextlib.contextmanager
def warnings_as_lines() -> Generator[None]:
    """Inside, each warning is printed once, as one line on stderr, without its location in the code."""
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
    """Let stdout write "?" for characters that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def ends_where_stdout_ends() -> Generator[None]:
    """Exit with code 1, and without a traceback, if stdout cannot be written: a closed pipe, a full disk.

    Raises:
        SystemExit: it cannot be written.
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
        # The interpreter flushes the buffer when it exits, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


@contextlib.contextmanager
def stdout_kept_for_json(as_json: bool) -> Generator[None]:
    """Inside, if JSON is to be printed, other output to stdout goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
