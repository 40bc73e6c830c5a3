"""Experts for the usages: five of a tiny Llama, three of them named as in the others' fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.tiny import save_experts

NAMES = ("math", "code", "prose", "law", "chemistry")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """The first n experts: name -> folder."""
    folders = save_experts(tmp_path_factory.mktemp("five"), "llama", NAMES, target_modules=["q_proj", "v_proj"])
    return lambda n: dict(list(folders.items())[:n])
