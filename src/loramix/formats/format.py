"""The contract of file formats, and their registry: a format recognises a folder, reads it, and writes its files.

To add one, subclass `ExpertFormat` or `MixtureFormat` and register an instance:

    class MyFormat(MixtureFormat):
        name = "mine"
        def matches(self, location): ...
        def read(self, location, adapters=None, config=None): ...     # without it, the format is write-only
        def writers(self, content): ...                               # without it, the format is read-only

    register_format(MyFormat())

`detect`, `describe`, `load_adapter` and `load_mixture` then recognise it, and `save_adapter(format="mine")` or
`save_mixture(format="mine")` writes it. A format handles tensors and configurations; models are built elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from loramix._registry import Registry
from loramix.config.base import PeftConfig
from loramix.config.folder import find_config
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import UnsupportedAdapterError, UnsupportedOperationError
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer
from loramix.files.location import Location
from loramix.formats.mixture import MixtureCheckpoint

Content = TypeVar("Content")


class Format(Generic[Content]):
    """A file format of experts or of mixtures.

    Attributes:
        name: the value of `format=` when saving; also used in messages.
        resumable: whether a trainer's `model.safetensors` is saved beside the files.
    """

    name: ClassVar[str]
    resumable: ClassVar[bool] = False

    def matches(self, location: Location) -> bool:
        """Whether the folder is of this format; False for a write-only format.

        Raises:
            CheckpointNotFoundError: no such folder or repository.
            CorruptCheckpointError: a file that must be read to know it, and cannot be.
        """
        return False

    def config(self, location: Location) -> PeftConfig:
        """The configuration, without the tensors.

        Raises:
            CheckpointError, AdapterError, ConfigurationError: as `load_adapter` and `load_mixture`.
        """
        return PeftConfig.from_json_file(find_config(location))

    def writers(self, content: Content) -> dict[str, Writer]:
        """The files to save: path relative to the folder -> a function that writes the file to the path it is given.

        They are renamed to their final names in this order (see `loramix.files.atomic`).

        Raises:
            UnsupportedOperationError: a read-only format.
        """
        raise UnsupportedOperationError(
            "Adapters are saved in a format that can be written.",
            received=f"format={self.name!r}, which is read-only",
            remedy="leave format= out",
        )

    def check_folder(self, folder: Path, content: Content) -> None:
        """Refuse to save into a folder whose files must not be replaced.

        Raises:
            SaveError: naming what is there.
        """

    def _write_only(self, location: Location) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            "Adapters are loaded from a format that can be read.",
            received=f"{str(location)!r} in the format {self.name!r}, which is write-only",
            remedy="load the adapter that was exported to it",
        )


class ExpertFormat(Format[Adapter]):
    """A file format of one expert."""

    def read(self, location: Location, name: str, config: LoraConfig | None = None) -> Adapter:
        """Read the expert, on the CPU and in its files' dtypes.

        Args:
            location: its folder.
            name: the expert's name, for the mixture and for messages.
            config: a configuration to use instead of the saved one.

        Raises:
            CheckpointError, AdapterError, ConfigurationError: as `load_adapter`.
        """
        raise self._write_only(location)


class MixtureFormat(Format[MixtureCheckpoint]):
    """A file format of a mixture."""

    def read(
        self,
        location: Location,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        config: XLoraConfig | None = None,
    ) -> MixtureCheckpoint:
        """Read the mixture, on the CPU and in its files' dtypes.

        Args:
            location: its folder.
            adapters: experts to use instead of the saved ones, as `loramix.formats.mixture.select_experts` takes them.
            config: a configuration to use instead of the saved one.

        Raises:
            CheckpointError, AdapterError, ConfigurationError: as `load_mixture`.
        """
        raise self._write_only(location)


_EXPERTS = Registry[ExpertFormat]("format", "loramix.formats.register_format")
_MIXTURES = Registry[MixtureFormat]("format", "loramix.formats.register_format")


def register_format(format: ExpertFormat | MixtureFormat) -> None:
    """Register a format. If several match a folder, the one that was registered first is used.

    Raises:
        ConfigurationError: the name is taken.
    """
    if isinstance(format, ExpertFormat):
        _EXPERTS.add(format.name, format)
    else:
        _MIXTURES.add(format.name, format)


def format_of(location: Location) -> ExpertFormat | MixtureFormat:
    """The format of a folder.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it.
        CorruptCheckpointError: a configuration that cannot be read.
        UnsupportedAdapterError: an adapter in no registered format.
    """
    formats = [*_EXPERTS.values(), *_MIXTURES.values()]
    for format in formats:
        if format.matches(location):
            return format
    config = PeftConfig.from_json_file(find_config(location))  # raises an error that says what is there
    known = ", ".join(repr(format.name) for format in formats)
    raise UnsupportedAdapterError(
        "Adapters are loaded from registered formats.",
        received=f"{str(location)!r}, a {type(config).__name__}",
        remedy=f"register its format (loramix.formats.register_format); there are {known}",
    )


def expert_format(name: str) -> ExpertFormat:
    """The format of experts with this name.

    Raises:
        ConfigurationError: there is none.
    """
    return _EXPERTS[name]


def mixture_format(name: str) -> MixtureFormat:
    """The format of mixtures with this name.

    Raises:
        ConfigurationError: there is none.
    """
    return _MIXTURES[name]
