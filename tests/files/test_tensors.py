"""Files of tensors say who wrote them and in which format; a newer format is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramix import CheckpointError, CorruptCheckpointError, __version__
from loramix.files import tensors
from loramix.files.tensors import is_ours, metadata_of, read_tensors, write_tensors

ONE = {"weight": torch.ones(2)}


def test_what_is_written_says_by_whom_and_in_which_format(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file.safetensors", ONE, record="a")
    assert is_ours(tmp_path / "file.safetensors")
    assert metadata_of(tmp_path / "file.safetensors") == {
        "format": "pt",
        "writer": "loramix",
        "loramix_version": __version__,
        "loramix_format": "1",
        "record": "a",
    }


def test_a_newer_format_is_refused_with_the_version_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = tensors._OURS | {"loramix_version": "7.1.0", "loramix_format": "2"}
    save_file(ONE, tmp_path / "file.safetensors", metadata=newer)
    with pytest.raises(CheckpointError, match=r"format 2, saved by loramix 7\.1\.0") as caught:
        read_tensors(tmp_path / "file.safetensors")
    assert not isinstance(caught.value, CorruptCheckpointError)
    assert caught.value.remedy == 'pip install "loramix>=7.1.0"'
    monkeypatch.setattr(tensors, "FORMAT", 2)
    assert torch.equal(read_tensors(tmp_path / "file.safetensors")["weight"], ONE["weight"])


@pytest.mark.parametrize("metadata", [None, {"writer": "loramix"}, {"loramix_format": "9"}, {"format": "pt"}])
def test_files_that_name_no_format_of_ours_are_read(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    """Earlier files of ours, PEFT's, and those of a writer that happens to use the key."""
    save_file(ONE, tmp_path / "file.safetensors", metadata=metadata)
    assert torch.equal(read_tensors(tmp_path / "file.safetensors")["weight"], ONE["weight"])
