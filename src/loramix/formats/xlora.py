"""PEFT's X-LoRA layout, and ours: the same, with the experts in the folder.

    adapter_config.json             peft_type XLORA, or LORAMIX if PEFT does not have the router or the gating;
                                    adapters: name -> where the expert came from
    adapter_model.safetensors       base_model.internal_xlora_classifier.layers.{i}.{weight,bias}, or
                                    base_model.internal_xlora_router.* of another kind of router; and
                                    base_model.model.<parameter> of an embedding or a head of the mixture's own
    <name>/adapter_config.json      each expert in PEFT's LoRA format
    <name>/adapter_model.safetensors

Also read: a mixture as PEFT saves it, with the experts at the places in `adapters`. The numbered folders that PEFT
writes beside it are not read: they lack the tensors of the blocks whose number is that of another expert.

Source: PEFT 0.21.2, `tuners/xlora/classifier.py` and `tuners/xlora/model.py`.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from loramix.config.base import PeftType
from loramix.config.folder import CONFIG_NAME, ORIGINAL_CONFIG_NAME, find_config
from loramix.config.xlora import XLoraConfig
from loramix.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompleteCheckpointError
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer, text_writer
from loramix.files.hub import is_local
from loramix.files.location import Location
from loramix.files.tensors import is_ours, read_tensors, write_tensors
from loramix.formats.format import MixtureFormat, register_format
from loramix.formats.load import read_expert
from loramix.formats.lora import PREFIX, expert_writers
from loramix.formats.mixture import (
    MixtureCheckpoint,
    check_before_experts,
    check_router,
    select_experts,
)
from loramix.formats.peft import (
    WEIGHTS_NAME,
    check_expert_folders,
    check_replaceable,
    find_weights,
    occupied,
    peft_type,
)
from loramix.routers import router_class


class XLoraFormat(MixtureFormat):
    """PEFT's X-LoRA layout; self-contained when loramix writes it."""

    name = "xlora"
    resumable = True

    def matches(self, location: Location) -> bool:
        return peft_type(location) in (PeftType.XLORA, PeftType.LORAMIX)

    def read(
        self,
        location: Location,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        config: XLoraConfig | None = None,
    ) -> MixtureCheckpoint:
        """Read a mixture.

        If loramix wrote the checkpoint, an expert is read from the subfolder with its name. Otherwise its place in
        `adapters` is tried as a path inside the checkpoint, then as an identifier.
        """
        saved = XLoraConfig.from_json_file(find_config(location))
        config, replaced = select_experts(saved, adapters, config, str(location))
        path = find_weights(location)
        router, base_weights = _parse_tensors(config, read_tensors(path), path)
        check_before_experts(config, router, str(path))
        self_contained = is_ours(path)
        experts: list[Adapter] = []
        for name, place in config.adapters.items():
            if name in replaced:
                experts.append(read_expert(location.elsewhere(place), name))
            else:
                experts.append(read_member(location, name, place, config, self_contained))
        checkpoint = MixtureCheckpoint(config, router, experts, base_weights, replaced=replaced)
        check_router(checkpoint, str(path), replaced)
        return checkpoint

    def writers(self, content: MixtureCheckpoint) -> dict[str, Writer]:
        """In `adapters`, Hub identifiers are kept, and local paths become the subfolders of this one."""
        writers: dict[str, Writer] = {}
        for expert in content.experts:
            writers |= {f"{expert.name}/{place}": write for place, write in expert_writers(expert).items()}
        prefix = f"base_model.{router_class(content.config).attribute}."
        tensors = {prefix + name: tensor for name, tensor in content.router.items()}
        tensors |= {PREFIX + name: tensor for name, tensor in content.base_weights.items()}
        writers[WEIGHTS_NAME] = partial(write_tensors, tensors=tensors)
        saved = copy.copy(content.config)
        saved.adapters = {name: name if is_local(place) else place for name, place in saved.adapters.items()}
        writers[CONFIG_NAME] = text_writer(saved.to_json())
        return writers

    def check_folder(self, folder: Path, content: MixtureCheckpoint) -> None:
        """Experts that were in subfolders before the mixture was saved are not replaced."""
        check_replaceable(folder, XLoraConfig)
        is_mixture = (folder / CONFIG_NAME).exists()
        if not is_mixture and (folder / ORIGINAL_CONFIG_NAME).exists():
            raise occupied(folder, "a mixture in the original library's files")
        check_expert_folders(folder, content.config.adapters, of_mixture=is_mixture)


register_format(XLoraFormat())


def read_member(location: Location, name: str, place: str, config: XLoraConfig, self_contained: bool) -> Adapter:
    """One of the checkpoint's own experts, from its folder or from the place in `adapters`.

    Args:
        location: the mixture's folder.
        name: the expert's name.
        place: a path inside the mixture's folder, or an identifier.
        config: the mixture's configuration.
        self_contained: whether the expert may lie in a subfolder with its name.
    """
    folders = [folder for folder in ([name] if self_contained else []) + [place] if _is_inside(folder)]
    for inside in map(location.below, folders):
        if has_adapter(inside):
            return read_expert(inside, name)
    if self_contained and place == name:
        raise IncompleteCheckpointError(
            "A self-contained mixture holds its experts.",
            received=f"{str(location)!r} without the folder {name!r} of that expert",
            remedy=f'Put it back, or say where it is: from_pretrained(…, adapters={{"{name}": "path or Hub id"}}).',
        )
    try:
        adapter = read_expert(location.elsewhere(place), name)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            "Every expert of a mixture is in the mixture's folder, or at its place in adapters.",
            received=f"expert {name!r} neither in {str(location)!r} ({', '.join(folders)}) nor at {place!r}: "
            f"{error.received}",
            remedy=f'Say where it is: from_pretrained(…, adapters={{"{name}": "path or Hub id"}}).',
        ) from error
    if config.use_trainable_adapters:
        warnings.warn(
            f"The mixture trained expert {name!r}, but does not hold it; the one at {place!r} may be untrained. PEFT "
            "does not save trained experts.",
            stacklevel=5,
        )
    return adapter


def _is_inside(place: str) -> bool:
    parts = Path(place).parts
    return bool(parts) and not (Path(place).is_absolute() or ".." in parts or "@" in place or "://" in place)


def has_adapter(location: Location) -> bool:
    """Whether there is such a folder, with an adapter in it."""
    try:
        return location.find(CONFIG_NAME) is not None
    except CheckpointNotFoundError:
        return False


def _parse_tensors(
    config: XLoraConfig, tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The router's tensors by their names in its `state_dict`, and the base model's by the names of its parameters.

    PEFT's prefixes of the router's may be missing or repeated.
    """
    own = is_ours(path)
    expression = re.compile(rf"(?:base_model\.)*(?:model\.)*{router_class(config).attribute}\.(.+)")
    router: dict[str, Tensor] = {}
    base_weights: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = expression.fullmatch(key)
        if match is None and own and key.startswith(PREFIX):
            base_weights[key.removeprefix(PREFIX)] = tensor
            continue
        if match is None or match[1] in router:
            raise CorruptCheckpointError(
                "A mixture's file holds each tensor of its router once, and nothing else.",
                received=f"{path}: key {key!r}, with router={config.router!r}",
                remedy="Give the folder of a mixture, or save it again.",
            )
        router[match[1]] = tensor
    return router, base_weights
