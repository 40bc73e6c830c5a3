"""Names of experts: each must be a folder on any file system, and no two the same one."""

from __future__ import annotations

import pytest

from loramix.config.names import check_expert_names
from loramix.errors import AdapterNameError

GOOD = ["math", "0", "1", "v1.5", "a b", "数学", "médecine", "x" * 255, ".hidden", "con-text", "adapter"]
BAD = {
    "": "empty",
    ".": "another folder",
    "..": "another folder",
    "../x": "'/'",
    "a/b": "'/'",
    "/abs": "'/'",
    "a\\b": "'\\\\'",
    "a\0b": "'\\x00'",
    "a\nb": "'\\n'",
    "a:b": "':'",
    " a": "space",
    "a ": "space",
    "a.": "dot",
    "x" * 256: "255",
    "é" * 128: "255",
    "\ud800": "UTF-8",
    "adapter_config.json": "reserved",
    "Adapter_Model.safetensors": "reserved",
    "model.safetensors": "reserved",
    ".loramix-journal.json": "reserved",
    "nul": "reserved",
    "COM1.txt": "reserved",
}


def test_names_that_can_be_folders_pass(tmp_path):
    check_expert_names(GOOD)
    for name in GOOD:
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(("name", "reason"), BAD.items(), ids=ascii)
def test_a_name_that_cannot_be_a_folder_is_refused_by_name(name, reason):
    with pytest.raises(AdapterNameError) as caught:
        check_expert_names(["math", name])
    assert repr(name) in caught.value.received
    assert reason in caught.value.received
    assert "folder" in caught.value.rule
    assert "math" in caught.value.remedy


def test_a_name_must_be_a_string():
    with pytest.raises(AdapterNameError, match="0, which is no string"):
        check_expert_names([0])  # type: ignore[list-item]


@pytest.mark.parametrize(("first", "second"), [("math", "math"), ("Math", "math"), ("é", "e\u0301"), ("ß", "SS")])
def test_two_names_for_one_folder_clash(first, second):
    with pytest.raises(AdapterNameError) as caught:
        check_expert_names(["code", first, second])
    assert repr(first) in caught.value.received
    assert repr(second) in caught.value.received
    assert "Rename" in caught.value.remedy
