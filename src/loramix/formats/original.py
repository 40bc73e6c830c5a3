"""The layout of the original X-LoRA library, which came before PEFT's.

    xlora_config.json               the configuration; adapters: a list of names, a mapping to places, or missing
    xlora_classifier.safetensors    inner.{i}.{weight,bias} and last.{weight,bias}; also read: xlora_classifier.pt
    <name>/adapter_config.json      each expert in PEFT's LoRA format; one called "default" lies in the folder itself
    <name>/adapter_model.safetensors

i counts the entries of a list: the hidden linear layers are 0, 3, 6, … with ReLU and dropout, 0, 1, 2, … without. The
library numbers the adapted layers as loramix does. What it computes otherwise is refused, when read and when written:

- `enable_softmax_topk`: its softmax is over the selected experts of all tokens of the batch together;
- `top_k_lora` with a `scaling_pass_value`: its scaling pass selects among equal values;
- experts with DoRA, whose magnitudes it ignores, and with LoRA biases, which it does not gate; experts of embeddings,
  convolutions and mixture-of-experts blocks, which it cannot run.

Source: github.com/EricLBuehler/xlora at 8217992, `xlora_config.py`, `xlora_classifier.py`, `xlora_insertion.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from loramix.config.checks import require, warn
from loramix.config.folder import CONFIG_NAME, ORIGINAL_CONFIG_NAME, find_config
from loramix.config.xlora import XLoraConfig, as_adapters
from loramix.errors import (
    AdapterNameError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedAdapterError,
    UnsupportedOperationError,
)
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer, text_writer
from loramix.files.hub import is_local
from loramix.files.json_file import read_json_object
from loramix.files.location import Location
from loramix.files.tensors import is_ours, read_tensors, write_tensors
from loramix.formats.format import MixtureFormat, expert_format, register_format
from loramix.formats.load import read_expert
from loramix.formats.lora import expert_writers
from loramix.formats.mixture import (
    MixtureCheckpoint,
    beyond_linear,
    beyond_the_classifier,
    check_before_experts,
    check_router,
    select_experts,
    selects_in_the_scaling_pass,
)
from loramix.formats.peft import check_expert_folders, occupied
from loramix.formats.xlora import has_adapter, read_member
from loramix.routers import RouterSizes, XLoraClassifier

CLASSIFIER_NAME = "xlora_classifier.safetensors"
PICKLE_NAME = "xlora_classifier.pt"

FIELDS = (
    "hidden_size",
    "enable_softmax",
    "enable_softmax_topk",
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "enable_relu_and_dropout",
    "use_bias",
    "xlora_dropout_p",
    "use_trainable_adapters",
    "softmax_temperature",
    "top_k_lora",
    "scaling_pass_value",
    "global_scaling_weight",
)
"""The fields that `XLoraConfig` has under the same name, with the same default."""
_OLD = ("stop_token_id", "use_mean_pool")
_KNOWN = {*FIELDS, *_OLD, "base_model_id", "adapters", "device"}
_AT_THE_TOP = "default"  # PEFT saves an adapter of this name without a folder of its own


class OriginalFormat(MixtureFormat):
    """The original library's layout; self-contained when loramix writes it."""

    name = "original"

    def matches(self, location: Location) -> bool:
        return location.find(ORIGINAL_CONFIG_NAME) is not None

    def config(self, location: Location) -> XLoraConfig:
        return _read_config(location)

    def read(
        self,
        location: Location,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        config: XLoraConfig | None = None,
    ) -> MixtureCheckpoint:
        """Read a mixture.

        An expert is read from the subfolder with its name; otherwise its place in `adapters` is tried as a path inside
        the checkpoint, then as an identifier. A checkpoint that names no experts takes those of `adapters`, in order.
        """
        saved = _read_config(location)
        named = bool(saved.adapters)
        if not named:
            adapters = adapters or (config.adapters if config is not None else None)
            saved.adapters = {} if adapters is None else as_adapters(adapters)
        if config is None:
            _refuse_other_scalings(saved, str(location))
        config, replaced = select_experts(saved, adapters, config, str(location))
        path = location.find(CLASSIFIER_NAME, PICKLE_NAME)
        if path is None:
            raise CheckpointNotFoundError(
                f"A mixture of the original library holds {CLASSIFIER_NAME} or {PICKLE_NAME}.",
                received=f"{str(location)!r}, which has neither",
                remedy="Download the mixture again; its experts can be used in a new one.",
            )
        router = _parse_tensors(config, read_tensors(path), path)
        check_before_experts(config, router, str(path))
        experts = [_expert(location, name, place, config, replaced) for name, place in config.adapters.items()]
        checkpoint = MixtureCheckpoint(config, router, experts)
        check_router(checkpoint, str(path), replaced if named else ())
        return checkpoint

    def writers(self, content: MixtureCheckpoint) -> dict[str, Writer]:
        """In `adapters`, Hub identifiers are kept, and local paths become the subfolders of this one."""
        refuse_what_it_cannot_hold(content)
        config = content.config
        writers: dict[str, Writer] = {}
        for expert in content.experts:
            writers |= {f"{expert.name}/{place}": write for place, write in expert_writers(expert).items()}
        tensors = {key: content.router[name] for key, name in _names(config).items()}
        writers[CLASSIFIER_NAME] = partial(write_tensors, tensors=tensors)
        values = {name: getattr(config, name) for name in FIELDS} | {
            "hidden_size": int(config.hidden_size),
            "base_model_id": content.base_model,
            "adapters": {name: name if is_local(place) else place for name, place in config.adapters.items()},
        }
        writers[ORIGINAL_CONFIG_NAME] = text_writer(json.dumps(values, indent=2) + "\n")
        return writers

    def check_folder(self, folder: Path, content: MixtureCheckpoint) -> None:
        """As for PEFT's layout; nor is a mixture saved beside an adapter in PEFT's files."""
        present = [name for name in (ORIGINAL_CONFIG_NAME, CLASSIFIER_NAME, PICKLE_NAME) if (folder / name).exists()]
        if present and not is_ours(folder / CLASSIFIER_NAME):
            raise occupied(folder, f"{', '.join(present)} that loramix did not write")
        if (folder / CONFIG_NAME).exists():
            raise occupied(folder, "an adapter in PEFT's files")
        check_expert_folders(folder, content.config.adapters, of_mixture=bool(present))


register_format(OriginalFormat())


def refuse_what_it_cannot_hold(content: MixtureCheckpoint) -> None:
    """Refuse to save what the original library would ignore, or compute otherwise.

    Raises:
        UnsupportedOperationError: naming it.
    """
    config = content.config
    found = [*beyond_the_classifier(config), *(f"weights of its own: {name}" for name in content.base_weights)]
    if config.enable_softmax_topk:
        found.append("enable_softmax_topk=True")
    if selects_in_the_scaling_pass(config):
        found.append(f"top_k_lora={config.top_k_lora} with scaling_pass_value={config.scaling_pass_value}")
    for expert in content.experts:
        found += [f"expert {expert.name!r} with {what}" for what in beyond_linear(expert)]
    if found:
        raise UnsupportedOperationError(
            "The original X-LoRA library has X-LoRA's classifier and its gating, and experts of linear layers.",
            received="; ".join(found),
            remedy='save the mixture in the format "xlora" (loramix convert … --to loramix)',
        )


def _read_config(location: Location) -> XLoraConfig:
    path = location.find(ORIGINAL_CONFIG_NAME)
    if path is None:
        find_config(location)  # raises an error that says what is there
        raise CheckpointNotFoundError(
            f"A mixture of the original library holds {ORIGINAL_CONFIG_NAME}.",
            received=f"{str(location)!r}, which has none",
            remedy="Give the folder that the library wrote.",
        )
    values = read_json_object(path)
    _check_fields(values, os.fspath(path))
    try:
        return XLoraConfig(
            adapters=_adapters(values.get("adapters")) or {},
            base_model_name_or_path=values.get("base_model_id"),
            **{name: values[name] for name in FIELDS if name in values},
        )
    except (ConfigurationError, AdapterNameError) as error:
        raise type(error)(error.rule, received=f"{error.received} in {path}", remedy=error.remedy) from error


def _check_fields(values: Mapping[str, Any], source: str) -> None:
    """Refuse what no token-wise router can repeat; warn of what is not known, or not there."""
    require(
        values.get("hidden_size") is not None,
        f"{ORIGINAL_CONFIG_NAME} says the base model's hidden size.",
        received=f"hidden_size={values.get('hidden_size')!r} in {source}",
        remedy='Add "hidden_size" to the file: the base model\'s config.hidden_size.',
    )
    require(
        not values.get("use_mean_pool"),
        "A mixture routes each token by its own hidden state.",
        received=f"use_mean_pool={values.get('use_mean_pool')!r} in {source}: one routing for a whole text",
        remedy="Use its experts in a new mixture, and train the router again.",
    )
    unknown = sorted(set(values) - _KNOWN)
    if unknown:
        warn(f"{source} holds fields that are not known: {', '.join(unknown)}. They are ignored.")
    if "use_mean_pool" in values:
        warn(
            f"{source} is of January 2024 ({', '.join(name for name in _OLD if name in values)}): the oldest versions "
            "of the library routed a whole text by its last token. Here each token is routed, as by later versions."
        )
    missing = [name for name in FIELDS if name not in values]
    if missing:
        defaults = ", ".join(f"{name}={XLoraConfig.__dataclass_fields__[name].default!r}" for name in missing)
        warn(f"{source} lacks fields that later versions have. Their defaults are used: {defaults}.")


def _adapters(saved: object) -> Any:
    """The experts' places by name; a list of names stands for folders."""
    if not isinstance(saved, list):
        return saved
    names = cast("list[object]", saved)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise AdapterNameError(
            "Two experts must not have one name.",
            received=f"{twice[0]!r} twice under adapters",
            remedy="Rename one of them in that file.",
        )
    require(
        all(isinstance(name, str) for name in names),
        "adapters must be the experts' names, or map them to folders or Hub ids.",
        received=f"adapters={saved!r}",
        remedy='Write "adapters": ["name", …].',
    )
    return dict(zip(names, names, strict=True))


def _refuse_other_scalings(config: XLoraConfig, source: str) -> None:
    """Refuse a gating whose scalings are not those of the original library."""
    remedy = "To have it computed as loramix does, pass config=XLoraConfig(…) with these settings, or change the file."
    require(
        not config.enable_softmax_topk,
        "The original library's softmax over the selected experts is one over all tokens together; loramix has none.",
        received=f"enable_softmax_topk=True in {source!r}",
        remedy=remedy,
    )
    require(
        not selects_in_the_scaling_pass(config),
        "The original library selects experts in its scaling pass too, among equal values; loramix does not.",
        received=f"top_k_lora={config.top_k_lora} with scaling_pass_value={config.scaling_pass_value} in {source!r}",
        remedy=remedy,
    )


def _names(config: XLoraConfig) -> dict[str, str]:
    """The library's keys of the classifier -> names in our `state_dict`."""
    shapes = XLoraClassifier.shapes(config, RouterSizes(config.hidden_size, 1, 1))
    places = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes))
    step = 3 if config.enable_relu_and_dropout else 1
    keys = [*(f"inner.{i * step}" for i in range(len(places) - 1)), "last"]
    parts = ("weight", "bias") if config.use_bias else ("weight",)
    return {f"{key}.{part}": f"{place}.{part}" for key, place in zip(keys, places, strict=True) for part in parts}


def _parse_tensors(config: XLoraConfig, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    names = _names(config)
    settings = ("xlora_depth", "enable_relu_and_dropout", "use_bias")
    shown = ", ".join(f"{name}={getattr(config, name)}" for name in settings)
    missing, unexpected = [key for key in names if key not in tensors], [key for key in tensors if key not in names]
    if missing:
        raise IncompleteCheckpointError(
            "A mixture's file holds every tensor of its router.",
            received=f"{path} without {', '.join(missing)}, with {shown}"
            + (f"; unexpected: {', '.join(unexpected)}" if unexpected else ""),
            remedy=f"Correct these settings in {ORIGINAL_CONFIG_NAME}, or download the mixture again.",
        )
    if unexpected:
        raise CorruptCheckpointError(
            "A mixture's file holds each tensor of its router once, and nothing else.",
            received=f"{path}: {', '.join(unexpected)}, with {shown}",
            remedy=f"Correct these settings in {ORIGINAL_CONFIG_NAME}, or download the mixture again.",
        )
    return {name: tensors[key] for key, name in names.items()}


def _expert(location: Location, name: str, place: str, config: XLoraConfig, replaced: tuple[str, ...]) -> Adapter:
    if name in replaced:
        expert = read_expert(location.elsewhere(place), name)
    elif name == _AT_THE_TOP and not has_adapter(location.below(name)) and has_adapter(location):
        expert = expert_format("lora").read(location, name)
    else:
        expert = read_member(location, name, place, config, self_contained=True)
    found = beyond_linear(expert)
    if found:
        raise UnsupportedAdapterError(
            "An expert in a mixture of the original library adapts linear layers, without DoRA and LoRA biases.",
            received=f"expert {name!r} with {', '.join(found)}",
            remedy="Leave the expert out, or use it in a new mixture.",
        )
    return expert
