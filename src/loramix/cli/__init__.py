"""The command line: one file a command, which calls the library and has no logic of its own.

Importing this package, and printing any help text, loads no torch: commands import what they call when they run.
"""

from __future__ import annotations

from loramix.cli.app import main

__all__ = ["main"]
