"""Loading an expert or a mixture, in any registered format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum

from loramix.config.base import PeftConfig
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import CheckpointError, LoramixError
from loramix.experts.adapter import Adapter, refuse_infinite
from loramix.files.hub import HubOptions
from loramix.files.location import Location
from loramix.formats.format import ExpertFormat, MixtureFormat, format_of
from loramix.formats.mixture import MixtureCheckpoint


class Kind(str, Enum):  # noqa: UP042 - equal to its string, and printed as JSON like one
    """The kind of a checkpoint."""

    EXPERT = "expert"
    MIXTURE = "mixture"


def detect(identifier: str | os.PathLike[str], options: HubOptions | None = None) -> Kind:
    """Whether a checkpoint is an expert or a mixture; its tensors are not read.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it.
        CorruptCheckpointError: a configuration that cannot be read.
        UnsupportedAdapterError: neither LoRA nor a mixture.
    """
    return kind_at(Location(identifier, options or HubOptions()))


def kind_at(location: Location) -> Kind:
    """`detect`, for a location."""
    return Kind.MIXTURE if isinstance(format_of(location), MixtureFormat) else Kind.EXPERT


def read_config(location: Location) -> PeftConfig:
    """The configuration of an expert or a mixture, without its tensors.

    Raises:
        CheckpointError, AdapterError, ConfigurationError: as `load_adapter` and `load_mixture`.
    """
    return format_of(location).config(location)


def load_adapter(
    name: str,
    identifier: str | os.PathLike[str],
    options: HubOptions | None = None,
    config: LoraConfig | None = None,
) -> Adapter:
    """Read one expert, on the CPU and in its file's dtype.

    Args:
        name: the expert's name, for the mixture and for messages.
        identifier: a local folder or a Hub identifier (see `loramix.files.hub`).
        options: how files are fetched.
        config: a configuration to use instead of the saved one.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it.
        CorruptCheckpointError: a file that cannot be read, tensors that contradict the configuration, or numbers that
            are not finite.
        IncompleteCheckpointError: missing tensors.
        UnsupportedAdapterError: a feature that a mixture does not support; raised before the tensors are read.
        CheckpointError: a mixture instead of an expert.
        ConfigurationError: invalid values in `adapter_config.json`.
    """
    expert = read_expert(Location(identifier, options or HubOptions()), name, config)
    refuse_infinite(name, expert.weights)
    return expert


def read_expert(location: Location, name: str, config: LoraConfig | None = None) -> Adapter:
    """`load_adapter`, from a location; the tensors are memory-mapped, and their values not checked."""
    try:
        format = format_of(location)
        if not isinstance(format, ExpertFormat):
            raise CheckpointError(
                "An expert is one LoRA adapter.",
                received=f"{str(location)!r}, a mixture (format {format.name!r})",
                remedy="Give the folder of one of its experts.",
            )
        return format.read(location, name, config)
    except LoramixError as error:
        raise _naming(name, error) from error


def _naming(name: str, error: LoramixError) -> LoramixError:
    if repr(name) in error.received:
        return error
    return type(error)(error.rule, received=f"for expert {name!r}: {error.received}", remedy=error.remedy)


def load_mixture(
    identifier: str | os.PathLike[str],
    options: HubOptions | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    config: XLoraConfig | None = None,
) -> MixtureCheckpoint:
    """Read a mixture, on the CPU and in its files' dtypes.

    Args:
        identifier: a local folder or a Hub identifier (see `loramix.files.hub`).
        options: how files are fetched. Revision and subfolder are the mixture's; experts that lie elsewhere say
            theirs in their own identifiers.
        adapters: experts to use instead of the saved ones. Names of the checkpoint replace those experts, and the
            others stay. If all names are new and there are as many as experts, they replace all experts in order.
        config: a configuration to use instead of the saved one, with the same router. If `adapters` is not given, the
            experts in which it differs from the saved one replace those.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it; likewise for an expert.
        CorruptCheckpointError: a file that cannot be read, or tensors that contradict the configuration.
        IncompleteCheckpointError: missing tensors, as in files that PEFT 0.20 to 0.21.2 saves.
        ConfigurationError: invalid settings, or `adapters` that do not fit the checkpoint.
        AdapterNameError: names that cannot be names of folders, or that clash.
        AdapterMismatchError: experts that replace those of a layerwise mixture, and adapt other layers.
        UnsupportedAdapterError: an expert with a feature that a mixture does not support.
        CheckpointError: an expert instead of a mixture.
    """
    mixture = read_mixture(Location(identifier, options or HubOptions()), adapters, config)
    for expert in mixture.experts:
        refuse_infinite(expert.name, expert.weights)
    return mixture


def read_mixture(
    location: Location,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    config: XLoraConfig | None = None,
) -> MixtureCheckpoint:
    """`load_mixture`, from a location; the experts' tensors are memory-mapped, and their values not checked."""
    format = format_of(location)
    if not isinstance(format, MixtureFormat):
        raise CheckpointError(
            "A mixture is a router and its experts.",
            received=f"{str(location)!r}, one expert (format {format.name!r})",
            remedy='Build a mixture of it and others: get_peft_model(base, XLoraConfig(adapters={"name": "folder"})).',
        )
    return format.read(location, adapters, config)
