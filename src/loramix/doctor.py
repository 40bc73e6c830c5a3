"""What an issue report should say about the machine: versions, devices, fused kernels, missing packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from loramix._versions import __version__, installed_version
from loramix.layers import fused

REQUIRED = ("torch", "transformers", "huggingface_hub", "tokenizers", "safetensors", "jaxtyping", "typer", "rich")
RELATED = (
    *("triton", "numpy", "peft", "vllm", "bitsandbytes", "torchao"),
    *("deepspeed", "unsloth", "flash-attn", "kernels"),
)
EXTRAS = ("train", "plot", "inspect")
SETTINGS = ("LORAMIX_FUSED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_ENABLE_MPS_FALLBACK")


@dataclass(frozen=True)
class Diagnosis:
    """What `loramix doctor` prints.

    Attributes:
        loramix: its version.
        python: version, implementation and platform.
        packages: required package -> its version; None if it is not installed.
        related: other package that matters to loramix -> its version, of those that are installed.
        optional: extra -> package -> its version; None if it is not installed.
        devices: device -> what it is.
        fused: device and dtype -> whether its layers use the fused kernels, or why not.
        settings: environment variable -> its value, of those that are set.
    """

    loramix: str
    python: str
    packages: dict[str, str | None]
    related: dict[str, str]
    optional: dict[str, dict[str, str | None]]
    devices: dict[str, str]
    fused: dict[str, str]
    settings: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """The same as plain data, for JSON."""
        return asdict(self)

    @property
    def absent(self) -> dict[str, list[str]]:
        """Extra -> its packages that are not installed, of the extras that lack any."""
        lacking = {
            extra: [name for name, version in kept.items() if version is None] for extra, kept in self.optional.items()
        }
        return {extra: names for extra, names in lacking.items() if names}


def diagnose() -> Diagnosis:
    """Diagnose this machine; on a GPU, the fused kernels are tried on small products."""
    versions = {name: installed_version(name) for name in REQUIRED}
    related = {name: found for name in RELATED if (found := installed_version(name)) is not None}
    optional = {extra: {name: installed_version(name) for name in names} for extra, names in _extras().items()}
    return Diagnosis(
        loramix=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}",
        packages=versions,
        related=related,
        optional=optional,
        devices=_devices(),
        fused=_fused(),
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
    )


def _extras() -> Mapping[str, list[str]]:
    """Extra -> the packages that it installs, as the installed loramix declares them."""
    found: dict[str, list[str]] = {name: [] for name in EXTRAS}
    try:
        lines = importlib.metadata.requires("loramix") or []
    except importlib.metadata.PackageNotFoundError:
        return {}  # a source tree on the path
    for line in lines:
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra is not None and name is not None and extra[1] in found and name[0] != "loramix":
            found[extra[1]].append(name[0])
    return found


def _devices() -> dict[str, str]:
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = {"cpu": f"{platform.machine()}, {threads}, {torch.backends.cpu.get_cpu_capability()}"}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{number}"] = f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}, {built}"
    if torch.backends.mps.is_available():
        found["mps"] = f"macOS {platform.mac_ver()[0]}"
    return found


def _fused() -> dict[str, str]:
    if os.environ.get("LORAMIX_FUSED") == "0":
        return {"all devices": "off, by LORAMIX_FUSED=0"}
    if not torch.cuda.is_available():
        return {"all devices": "off: there is no CUDA device"}
    if not fused.ENABLED:
        return {"all devices": "off: triton is not installed"}
    return {
        f"cuda:{number} {str(dtype).removeprefix('torch.')}": _proof(torch.device("cuda", number), dtype)
        for number in range(torch.cuda.device_count())
        for dtype in fused.TOLERANCES
    }


def _proof(device: torch.device, dtype: torch.dtype) -> str:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if fused.proven(device, dtype):
            return "on"
    return "off: " + (str(told[0].message) if told else "it needs compute capability 8.0")
