"""What every test stands on: no network, one thread, quiet transformers, and three experts for each tiny model.

torch, transformers and loramix are imported inside the fixtures: the process that only hands tests to workers needs
none of them, and loramix's annotations are checked only if pytest's settings come first.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import gc
from collections.abc import Callable

import hypothesis
import jaxtyping
import pytest

import shape_checker

jaxtyping.jaxtyped = shape_checker.jaxtyped
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
gc.disable()  # while tests are collected, next to nothing is garbage


def pytest_collection_finish() -> None:
    """Modules and tests stay: the garbage collector need not look through them again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    # Where CUDA has not been used yet, torch.manual_seed keeps a stack trace of each call for it.
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Architecture -> the folders of its experts math, code and prose, of ranks 2, 3 and 4; written once."""
    from support.tiny import save_experts

    return functools.cache(lambda name: save_experts(tmp_path_factory.mktemp(name), name))
