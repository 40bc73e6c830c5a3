"""Rewriting a saved mixture in another format, and saying what that format does not hold."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loramix.config.folder import CONFIG_NAME, ORIGINAL_CONFIG_NAME
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, LoramixError, SaveError
from loramix.experts.on_base import on_base
from loramix.files.base_models import load_config, without_weights
from loramix.files.hub import is_local
from loramix.files.location import Location
from loramix.formats import MixtureCheckpoint, load_mixture, save_mixture
from loramix.formats.format import format_of
from loramix.formats.mistral_rs import ORDERING_NAME, OrderingFormat
from loramix.formats.original import CLASSIFIER_NAME, FIELDS, PICKLE_NAME, OriginalFormat
from loramix.formats.peft import READ_NAMES
from loramix.formats.peft_xlora import PeftXLoraFormat
from loramix.formats.xlora import XLoraFormat
from loramix.layers.inject import plan
from loramix.routers import RouterSizes, router_class

FORMATS = {"peft": PeftXLoraFormat.name, "original": OriginalFormat.name, "loramix": XLoraFormat.name}
"""What `convert` writes -> the name of the registered format."""
_READ = {CONFIG_NAME, *READ_NAMES, ORIGINAL_CONFIG_NAME, CLASSIFIER_NAME, PICKLE_NAME}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Args:
        source: what was read.
        source_format: its format's name.
        folder: what was written.
        format: peft, original or loramix.
        experts: the experts' names in the source -> those in the folder.
        num_layers: L.
        ordering: whether mistral.rs's ordering file was written too.
        notes: what the folder does not hold, or holds otherwise, one sentence each.
    """

    source: str
    source_format: str
    folder: str
    format: str
    experts: Mapping[str, str]
    num_layers: int
    ordering: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The conversion in JSON's types."""
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    to: str,
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    base: str | None = None,
) -> Conversion:
    """Read a mixture in any registered format, and write it in another. Tensors stay as they are, bit by bit.

    Args:
        source: folder or Hub id of the mixture.
        folder: a new or empty folder.
        to: "peft" for PEFT, "original" for the original X-LoRA library and mistral.rs, "loramix" for the layout that
            `save_pretrained` writes.
        adapters: experts to use instead of the saved ones, or where none are named; as `load_mixture` takes them.
        base: folder or Hub id of the base model, if not the one that the mixture names. Only its configuration is read,
            and only for mistral.rs's ordering file.

    Raises:
        ConfigurationError: another `to`.
        SaveError: a folder with something in it, or one that cannot be written.
        UnsupportedOperationError: what the format cannot hold, and without which the mixture would be another one.
        CheckpointError, AdapterError: as `load_mixture`.
    """
    if to not in FORMATS:
        raise ConfigurationError(
            f"A mixture is converted to {', '.join(FORMATS)}.", received=f"to={to!r}", remedy="choose one of these"
        )
    place = Path(folder)
    check_empty(place)
    location = Location(source)
    mixture, notes = load_mixture(source, adapters=adapters), list[str]()
    names = [expert.name for expert in mixture.experts]
    if to == "peft":
        mixture, notes = _for_peft(mixture, place.resolve())
    numbered = None
    if to == "original":
        notes += _lost_fields(mixture.config)
        try:
            numbered = replace(mixture, layers=_layers(mixture, base))
        except LoramixError as error:
            if base is not None:
                raise
            notes.append(
                f"{ORDERING_NAME} for mistral.rs needs the base model: convert into another folder with --base. "
                f"{error.received}"
            )
    save_as(place, mixture, FORMATS[to])
    if numbered is not None:
        save_as(place, numbered, OrderingFormat.name)
    notes += left_behind(location, mixture, names)
    return Conversion(
        source=os.fspath(source),
        source_format=format_of(location).name,
        folder=os.fspath(folder),
        format=to,
        experts=dict(zip(names, mixture.config.adapters, strict=True)),
        num_layers=mixture.num_layers,
        ordering=numbered is not None,
        notes=tuple(notes),
    )


def check_empty(place: Path) -> None:
    """Raises SaveError: a file, or a folder with something in it."""
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise SaveError(
            "A mixture is rewritten into a new or empty folder.",
            received=f"{str(place)!r}, which is a file or has something in it",
            remedy="name another folder, or remove this one",
        )


def save_as(place: Path, mixture: MixtureCheckpoint, format: str) -> None:
    """`save_mixture`, of a mixture as data."""
    save_mixture(
        place,
        mixture.config,
        mixture.router,
        mixture.experts,
        base_weights=mixture.base_weights,
        layers=mixture.layers,
        format=format,
    )


def _for_peft(mixture: MixtureCheckpoint, place: Path) -> tuple[MixtureCheckpoint, list[str]]:
    """The mixture as PEFT can run it: its experts by number, and a classifier with all its parts."""
    config, router, notes = copy.copy(mixture.config), dict(mixture.router), list[str]()
    numbers = [str(number) for number in range(len(mixture.experts))]
    names = dict(zip(config.adapters, numbers, strict=True))
    config.elsewhere = {
        part: {names[name]: share for name, share in given.items()} if isinstance(given, dict) else given
        for part, given in config.elsewhere.items()
    }
    if list(names) != numbers:
        shown = ", ".join(f"{name} is {number}" for name, number in names.items())
        notes.append(f"The experts' names are not kept, since PEFT numbers them: {shown}.")
    notes += [
        f"Expert {name} is not taken from {at} any more." for name, at in config.adapters.items() if not is_local(at)
    ]
    notes.append("adapters holds absolute paths, as PEFT needs them: correct them when the folder is moved.")
    config.adapters = {number: str(place / number) for number in numbers}
    if config.router == "classifier" and not config.enable_relu_and_dropout and config.xlora_depth == 1:
        config.enable_relu_and_dropout = True
        notes.append("enable_relu_and_dropout=False is not kept: it has no effect with xlora_depth=1.")
    if config.router == "classifier" and not config.use_bias:
        config.use_bias = True
        sizes = RouterSizes(config.hidden_size, mixture.num_layers, len(numbers))
        shapes = router_class(config).shapes(config, sizes)
        like = next(iter(router.values()))
        router |= {name: torch.zeros(shape, dtype=like.dtype) for name, shape in shapes.items() if name not in router}
        notes.append("use_bias=False is not kept: the classifier has biases in PEFT, here zeros.")
    experts = [replace(expert, name=number) for expert, number in zip(mixture.experts, numbers, strict=True)]
    return replace(mixture, config=config, router=router, experts=experts), notes


def _lost_fields(config: XLoraConfig) -> list[str]:
    """The fields that the original library's configuration has not, where they differ from their defaults."""
    default = XLoraConfig(hidden_size=config.hidden_size, adapters={}).to_dict()
    kept = {*FIELDS, "base_model_name_or_path", "adapters", "peft_type"}
    lost = {name: value for name, value in config.to_dict().items() if name not in kept and value != default.get(name)}
    return [
        f"{name}={getattr(value, 'value', value)!r} is not kept: there is no such field."
        for name, value in lost.items()
    ]


def _layers(mixture: MixtureCheckpoint, base: str | None) -> list[str]:
    """The paths of the adapted layers in the order of their numbers, from the base model's configuration."""
    identifier = base or mixture.base_model
    if identifier is None:
        raise ConfigurationError(
            "The layers of a mixture are numbered as its base model has them.",
            received="a mixture that names no base model",
            remedy="name it with --base FOLDER_OR_HUB_ID",
        )
    model = without_weights(load_config(identifier, None if base else mixture.config.revision))
    return [site.path for site in plan(model, [on_base(model, expert) for expert in mixture.experts])]


def left_behind(location: Location, mixture: MixtureCheckpoint, names: Sequence[str]) -> Iterator[str]:
    """The other files in the source's folder: a trainer's state, records, a model card."""
    place = Path(location.identifier)
    experts = {Path(expert.source).resolve() for expert in mixture.experts}
    found = sorted(place.iterdir()) if place.is_dir() else []
    for path in found:
        known = path.name in _READ or path.name in names or path.name.startswith(".")
        if not known and not any(path.resolve() in (expert, *expert.parents) for expert in experts):
            yield f"{path.name} is not copied."
