"""How commands speak: text and JSON on stdout, errors on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from loramix.errors import LoramixError


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


def print_json(document: Mapping[str, Any]) -> None:
    """Write one JSON document, and nothing else, to stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def stdout_kept_for_json(wanted: bool) -> Generator[None]:
    """While this is open, and if wanted, whatever is printed to stdout goes to stderr instead."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield
