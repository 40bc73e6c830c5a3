"""A process that is killed while it saves leaves a whole state, whenever it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_killed_save_leaves_one_of_the_two_states() -> None:
    """In a process of its own: a forked child may use no lock that another thread holds."""
    command = [sys.executable, "-m", "benchmarks.killed_saves", "--tries", "20", "--seed", os.environ.get("SEED", "0")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "first" in found.stdout
    assert "second" in found.stdout
