"""`loramix doctor`: what it says of a machine as it is, with packages missing, and with GPUs that work or do not."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers

import loramix as package
from loramix import doctor
from loramix.layers import fused


def test_the_versions_are_those_that_are_imported(loramix) -> None:
    lines = loramix("doctor").out.splitlines()
    said = dict(line.split(maxsplit=1) for line in lines if line.startswith("  ") and " " in line.strip())
    assert said["loramix"] == package.__version__
    assert said["torch"] == torch.__version__
    assert said["transformers"] == transformers.__version__
    assert said["cpu"].startswith(doctor.platform.machine())


def test_as_json_it_holds_the_same(loramix) -> None:
    document = json.loads(loramix("doctor", "--json").out)
    assert document["packages"]["torch"] == torch.__version__
    assert document["optional"]["train"]["trl"] == importlib.metadata.version("trl")
    assert document == json.loads(json.dumps(doctor.diagnose().to_dict()))


def test_what_is_not_installed_is_named_with_its_extra(loramix, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("trl", "matplotlib", "safetensors"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    out = loramix("doctor").out
    assert "safetensors      not installed" in out
    absent = out.partition("optional, and not installed\n")[2]
    assert "loramix[train]    trl\n" in absent
    assert "loramix[plot]     matplotlib\n" in absent


@pytest.mark.parametrize(
    ("works", "said"), [(True, "on"), (False, "off: it needs compute capability 8.0"), ("no driver", "off: no driver")]
)
def test_a_gpu_and_whether_the_fused_kernels_work_there(
    works: bool | str, said: str, loramix, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(name="A GPU", total_memory=24 * 2**30, major=7, minor=5)

    def proven(device: torch.device, dtype: torch.dtype) -> bool:
        if isinstance(works, str):
            warnings.warn(works, stacklevel=2)
        return works is True

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(fused, "ENABLED", True)
    monkeypatch.setattr(fused, "proven", proven)
    out = loramix("doctor").out
    assert "cuda:0  A GPU, 24 GiB, compute capability 7.5, " in out
    assert f"cuda:0 bfloat16  {said}\n" in out


def test_a_switch_in_the_environment_is_told(loramix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_FUSED", "0")
    out = loramix("doctor").out
    assert "all devices  off, by LORAMIX_FUSED=0\n" in out
    assert "LORAMIX_FUSED  " in out
