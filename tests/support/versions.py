"""Tests that need a newer transformers than the lowest: the reason is shown where they are skipped."""

from __future__ import annotations

import pytest
import transformers

from loramix._versions import release_of


def is_older(major: int, minor: int) -> bool:
    """Whether the installed transformers is older than this version."""
    return release_of(transformers.__version__) < (major, minor)


def needs_transformers(major: int, minor: int, why: str) -> pytest.MarkDecorator:
    """Skip before this version.

    Args:
        major: of the version.
        minor: likewise.
        why: what older versions lack, or do wrong themselves.
    """
    return pytest.mark.skipif(is_older(major, minor), reason=f"transformers {transformers.__version__}: {why}")
