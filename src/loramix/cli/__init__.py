"""The command line: `loramix COMMAND`. One file a command; a command calls the library and has no logic.

Importing this package, and printing any help text, loads no torch: commands import what they call when they run.
"""

from __future__ import annotations

from loramix.cli.app import main

__all__ = ["main"]
