"""What a training starts from, written once."""

from __future__ import annotations

import pytest

from support.training_files import Files, write_training_files


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_training_files(tmp_path_factory.mktemp("training"))
