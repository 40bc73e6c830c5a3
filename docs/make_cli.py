"""Writes docs/cli.md from the help texts themselves. `make docs` runs it; a test holds the page against it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from loramix.cli.app import COMMANDS

PAGE = Path(__file__).with_name("cli.md")
TERMINAL = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUTF8": "1"}
HEAD = """# The command line

Made from the help texts by `make docs`. All of them answer without loading torch.

Exit codes: 0 done; 1 one of loramix's own errors, with its rule, what was received and the remedy on stderr, or a demo
whose router did not earn its place; 2 wrong usage. With `--json`, stdout holds one JSON document and nothing else.
"""


def help_text(*command: str) -> str:
    """What `loramix COMMAND --help` prints, 100 columns wide and without colour."""
    code = "from loramix.cli import main; main()"
    words = [sys.executable, "-c", code, *command, "--help"]
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "FORCE_", "PY_COLORS"))
    }
    printed = subprocess.run(words, env=kept | TERMINAL, capture_output=True, text=True, encoding="utf-8", check=True)
    return "\n".join(line.rstrip() for line in printed.stdout.strip().splitlines())


def page() -> str:
    """The whole page."""
    sections = [(("loramix", *command), help_text(*command)) for command in ((), *((name,) for name in COMMANDS))]
    return HEAD + "".join(f"\n## {' '.join(title)}\n\n```text\n{text}\n```\n" for title, text in sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
