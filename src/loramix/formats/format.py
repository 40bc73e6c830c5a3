"""What a file format is: it recognises a folder, reads it, and says which files to write.

To add one, subclass `ExpertFormat` or `MixtureFormat` and register an instance:

    class MyFormat(MixtureFormat):
        name = "mine"
        def matches(self, location): ...
        def read(self, location, adapters=None, config=None): ...     # left out: the format is only written
        def writers(self, content): ...                               # left out: the format is only read

    register_format(MyFormat())

`detect`, `describe`, `load_adapter` and `load_mixture` then recognise it; `save_adapter` and `save_mixture` take its
name. A format gives tensors and configurations: models are built from them elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from loramix.config.base import PeftConfig
from loramix.config.folder import find_config
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, UnsupportedAdapterError, UnsupportedOperationError
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer
from loramix.files.location import Location
from loramix.formats.mixture import MixtureCheckpoint

Content = TypeVar("Content")


class Format(Generic[Content]):
    """A file format of experts or of mixtures.

    Attributes:
        name: by which it is saved in, and named in messages.
        resumable: whether a trainer's `model.safetensors` belongs beside its files.
    """

    name: ClassVar[str]
    resumable: ClassVar[bool] = False

    def matches(self, location: Location) -> bool:
        """Whether the files there are of this format; False where it is only written.

        Raises:
            CheckpointNotFoundError: no such folder or repository.
            CorruptCheckpointError: a file that must be read for this, and cannot be.
        """
        return False

    def writers(self, content: Content) -> dict[str, Writer]:
        """The files of a save: path relative to the folder -> what writes it, in the order of their coming into force.

        Raises:
            UnsupportedOperationError: the format is only read.
        """
        raise UnsupportedOperationError(
            "A format in which something is saved can be written.",
            received=f"format={self.name!r}, which is only read",
            remedy="leave format= out",
        )

    def check_folder(self, folder: Path, content: Content) -> None:
        """Refuse to save where something else lies in the way.

        Raises:
            SaveError: saying what.
        """

    def _only_written(self, location: Location) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            "A format that is loaded can be read.",
            received=f"{str(location)!r} in the format {self.name!r}, which is only written",
            remedy="give the folder that it was written from",
        )


class ExpertFormat(Format[Adapter]):
    """A file format of one expert."""

    def read(self, location: Location, name: str, config: LoraConfig | None = None) -> Adapter:
        """Read the expert, on the CPU and in its files' dtypes.

        Args:
            location: its folder.
            name: the expert's name, for the mixture and for messages.
            config: to read the tensors by, instead of the files' own.

        Raises:
            CheckpointError, AdapterError, ConfigurationError: as `load_adapter`.
        """
        raise self._only_written(location)


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
            adapters: experts to use instead of its own; `loramix.formats.mixture.select_experts` has the rule.
            config: a configuration to use instead of its own.

        Raises:
            CheckpointError, AdapterError, ConfigurationError: as `load_mixture`.
        """
        raise self._only_written(location)


_FORMATS: dict[str, ExpertFormat | MixtureFormat] = {}


def register_format(format: ExpertFormat | MixtureFormat) -> None:
    """Let a format be recognised and written; what several match is of the one that was registered first.

    Raises:
        ConfigurationError: another format has its name.
    """
    if format.name in _FORMATS:
        raise ConfigurationError(
            "A format is registered under a name of its own.",
            received=f"{format.name!r}, which is {type(_FORMATS[format.name]).__qualname__}",
            remedy="choose another name",
        )
    _FORMATS[format.name] = format


def format_of(location: Location) -> ExpertFormat | MixtureFormat:
    """The format of the files in a folder.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it.
        CorruptCheckpointError: a configuration that cannot be read.
        UnsupportedAdapterError: an adapter of no format that is registered.
    """
    for format in _FORMATS.values():
        if format.matches(location):
            return format
    config = PeftConfig.from_json_file(find_config(location))  # raises, and says what lies there instead
    raise UnsupportedAdapterError(
        "An adapter is of a format that is registered.",
        received=f"{str(location)!r}, a {type(config).__name__}",
        remedy=f"register its format (loramix.formats.register_format); there are {', '.join(map(repr, _FORMATS))}",
    )


def expert_format(name: str) -> ExpertFormat:
    """A format of experts by its name.

    Raises:
        ConfigurationError: there is none of this name.
    """
    format = _FORMATS.get(name)
    if not isinstance(format, ExpertFormat):
        raise _no_format(name, "an expert", ExpertFormat)
    return format


def mixture_format(name: str) -> MixtureFormat:
    """A format of mixtures by its name.

    Raises:
        ConfigurationError: there is none of this name.
    """
    format = _FORMATS.get(name)
    if not isinstance(format, MixtureFormat):
        raise _no_format(name, "a mixture", MixtureFormat)
    return format


def _no_format(name: str, content: str, kind: type[object]) -> ConfigurationError:
    names = [known for known, format in _FORMATS.items() if isinstance(format, kind)]
    return ConfigurationError(
        f"The format of {content} is one of {', '.join(map(repr, names))}.",
        received=f"format={name!r}",
        remedy="leave format= out, or import the package that registers it with loramix.formats.register_format before",
    )
