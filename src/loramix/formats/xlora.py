"""Reading a mixture: the configuration, the classifier's tensors, and each expert in a folder named after it.

    adapter_config.json             peft_type XLORA, adapters: name -> where the expert came from
    adapter_model.safetensors       base_model.internal_xlora_classifier.layers.{i}.{weight,bias}
    <name>/adapter_config.json      each expert in PEFT's LoRA format
    <name>/adapter_model.safetensors

Read as well: a mixture as PEFT saves it, whose experts lie where `adapters` says.

E: experts. L: adapted layers. H: hidden size of the base model.

Source: PEFT 0.21.2, `tuners/xlora/classifier.py` and `tuners/xlora/model.py`.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from loramix.config.folder import CONFIG_NAME
from loramix.config.xlora import XLoraConfig, as_adapters
from loramix.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
)
from loramix.experts.adapter import Adapter
from loramix.files.hub import HubOptions, find_file, from_anywhere
from loramix.files.tensors import all_finite, is_ours, read_tensors
from loramix.formats.lora import find_weights, load_adapter

CLASSIFIER_PREFIX = "base_model.internal_xlora_classifier."
_CLASSIFIER_KEY = re.compile(r"(?:base_model\.)*(?:model\.)*internal_xlora_classifier\.(layers\.\d+\.(?:weight|bias))")


@dataclass(frozen=True)
class MixtureCheckpoint:
    """What a mixture's files hold.

    Args:
        config: its `adapters` names the experts, in order.
        classifier: "layers.{i}.weight" and "layers.{i}.bias" -> tensor.
        experts: in the order of `config.adapters`.
    """

    config: XLoraConfig
    classifier: dict[str, Tensor]
    experts: list[Adapter]


def load_mixture(
    identifier: str | os.PathLike[str],
    options: HubOptions | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    config: XLoraConfig | None = None,
) -> MixtureCheckpoint:
    """Read a mixture, on the CPU and in its files' dtypes.

    An expert is read from the folder of its name inside the checkpoint, where loramix wrote it; else from its path in
    `adapters` inside the checkpoint; else from that identifier. The numbered folders that PEFT writes beside an
    X-LoRA checkpoint are not read: they lack whatever lies in the blocks whose number is that of another expert.

    Args:
        identifier: a local folder or a Hub identifier (see `loramix.files.hub`).
        options: how files are fetched. Revision and subfolder are the mixture's; experts that lie elsewhere say
            theirs in their own identifiers.
        adapters: experts to use instead. Names of the checkpoint replace those experts, and the others stay. New
            names only, as many as the checkpoint has experts, replace all of them in order and become the names.
        config: a configuration to use instead of the saved one, which must describe the same classifier. Experts that
            it names otherwise than the saved one count as `adapters`, where these are not given.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it; likewise for an expert.
        CorruptCheckpointError: a file that cannot be read, or tensors that contradict the configuration.
        IncompleteCheckpointError: tensors are missing, as in what PEFT 0.20 to 0.21.2 saves.
        ConfigurationError: settings that cannot work, or `adapters` that do not fit the checkpoint's.
        AdapterNameError: names that cannot be folders, or that clash.
        UnsupportedAdapterError: an expert's feature that a mixture cannot carry.
        CheckpointError: a LoRA expert instead of a mixture.
    """
    options = options or HubOptions()
    saved = XLoraConfig.from_pretrained(identifier, **asdict(options))
    if adapters is None and config is not None:
        adapters = {n: place for n, place in config.adapters.items() if saved.adapters.get(n) != place} or None
    chosen = replace_adapters(saved.adapters, adapters)
    config = copy.deepcopy(config or saved)
    config.adapters = chosen
    if not chosen:
        raise ConfigurationError(
            "A mixture names its experts.",
            received=f"adapters={saved.adapters!r} in {os.fspath(identifier)!r}",
            remedy='Say what they are: from_pretrained(…, adapters={"name": "path or Hub id"}), or correct the file.',
        )
    path = find_weights(identifier, options)
    classifier = _parse_classifier(read_tensors(path), path)
    check_classifier(config, classifier, str(path))
    self_contained = is_ours(path)
    experts: list[Adapter] = []
    for name, place in chosen.items():
        if adapters is not None and name in adapters:
            experts.append(load_adapter(name, place, options.elsewhere()))
        else:
            experts.append(_load_member(identifier, options, name, place, config, self_contained))
    return MixtureCheckpoint(config, classifier, experts)


def replace_adapters(saved: Mapping[str, str], given: Mapping[str, str | os.PathLike[str]] | None) -> dict[str, str]:
    """The experts of a checkpoint after `from_pretrained(adapters=given)`; the rule is `load_mixture`'s.

    Raises:
        ConfigurationError: no mapping, a wrong count, or some names of the checkpoint and some new ones.
        AdapterNameError: new names that cannot be folders, or that clash.
    """
    if given is None:
        return dict(saved)
    paths = {name: from_anywhere(place) for name, place in as_adapters(given).items()}
    if paths and set(paths) <= set(saved):
        return {**saved, **paths}
    if len(paths) == len(saved) and not set(paths) & set(saved):
        return paths
    raise ConfigurationError(
        f"adapters= replaces experts of the checkpoint by name, or all {len(saved)} of them by new names.",
        received=f"{', '.join(map(repr, given)) or 'no names'} for a checkpoint with {', '.join(map(repr, saved))}",
        remedy=f"Use names of the checkpoint only, or exactly {len(saved)} new ones.",
    )


def _load_member(
    identifier: str | os.PathLike[str],
    options: HubOptions,
    name: str,
    place: str,
    config: XLoraConfig,
    self_contained: bool,
) -> Adapter:
    folders = [folder for folder in ([name] if self_contained else []) + [place] if _is_inside(folder)]
    for folder in folders:
        if _has_adapter(identifier, options.below(folder)):
            adapter = load_adapter(name, identifier, options.below(folder))
            adapter.source = f"{os.fspath(identifier)}/{folder}"
            return adapter
    if self_contained and place == name:
        raise IncompleteCheckpointError(
            "A mixture that loramix saved holds its experts.",
            received=f"{os.fspath(identifier)!r} without the folder {name!r} of that expert",
            remedy=f'Put it back, or say where it is: from_pretrained(…, adapters={{"{name}": "path or Hub id"}}).',
        )
    try:
        adapter = load_adapter(name, place, options.elsewhere())
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            "Every expert of a mixture lies in the mixture's folder, or where adapters says.",
            received=f"expert {name!r} neither in {os.fspath(identifier)!r} ({', '.join(folders)}) nor at {place!r}: "
            f"{error.received}",
            remedy=f'Say where it is: from_pretrained(…, adapters={{"{name}": "path or Hub id"}}).',
        ) from error
    if config.use_trainable_adapters:
        warnings.warn(
            f"The mixture trained expert {name!r}, but does not hold it; the one at {place!r} may be untrained. PEFT "
            "does not save trained experts.",
            stacklevel=3,
        )
    return adapter


def _is_inside(place: str) -> bool:
    parts = Path(place).parts
    return bool(parts) and not (Path(place).is_absolute() or ".." in parts or "@" in place or "://" in place)


def _has_adapter(identifier: str | os.PathLike[str], options: HubOptions) -> bool:
    try:
        return find_file(identifier, CONFIG_NAME, options) is not None
    except CheckpointNotFoundError:
        return False


def classifier_shapes(config: XLoraConfig, out: int) -> dict[str, tuple[int, ...]]:
    """The classifier's tensors and their shapes.

    The linear layers sit at every third place of the sequence with dropout, else at every second: a ReLU, and the
    dropout, come after each but the last.

    Args:
        config: depth, sizes and dropout.
        out: outputs of the last layer: E, or L * E with `layerwise_scalings`.
    """
    depth = config.xlora_depth
    step = 3 if config.xlora_dropout_p > 0 else 2
    widths = [config.hidden_size, *[config.xlora_size] * (depth - 1), out]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        shapes[f"layers.{i * step}.weight"] = (widths[i + 1], widths[i])
        shapes[f"layers.{i * step}.bias"] = (widths[i + 1],)
    return shapes


def check_classifier(config: XLoraConfig, classifier: Mapping[str, Tensor], source: str) -> None:
    """Check that a classifier's tensors are those that the configuration asks for.

    Raises:
        IncompleteCheckpointError: some are missing.
        CorruptCheckpointError: more than those, or other shapes.
    """
    experts = max(len(config.adapters), 1)
    last = list(classifier_shapes(config, 0))[-1]
    out = classifier[last].numel() if last in classifier else 0
    expected = classifier_shapes(config, out if config.layerwise_scalings and out else experts)
    missing = [name for name in expected if name not in classifier]
    if missing:
        raise IncompleteCheckpointError(
            "A mixture's file holds every tensor of its classifier.",
            received=f"{source} without {', '.join(missing)}; PEFT 0.20 to 0.21.2 drop such tensors when they save "
            "an X-LoRA model",
            remedy="Train the mixture again with loramix, or save it again with PEFT 0.19.1 or older; the experts "
            "themselves can be used in a new mixture.",
        )
    found = {name: tuple(tensor.shape) for name, tensor in classifier.items()}
    wrong = [name for name in found if found[name] != expected.get(name)]
    if wrong or out % experts:
        shown = "; ".join(f"{name} expected {expected.get(name, 'none')}, found {found[name]}" for name in wrong)
        raise CorruptCheckpointError(
            "A mixture's classifier has the shapes that its configuration asks for.",
            received=f"{source}: {shown or f'{out} outputs, which is no multiple of the {experts} experts'}",
            remedy="Correct adapter_config.json (hidden_size, xlora_depth, xlora_size, xlora_dropout_p, "
            "layerwise_scalings, adapters), or save the mixture again.",
        )


def _parse_classifier(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    classifier: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _CLASSIFIER_KEY.fullmatch(key)
        if match is None or match[1] in classifier:
            raise CorruptCheckpointError(
                "A mixture's file holds each tensor of its classifier once, and nothing else.",
                received=f"{path}: key {key!r}",
                remedy="Give the folder of a mixture, or save it again.",
            )
        classifier[match[1]] = tensor
    strange = [name for name, tensor in classifier.items() if not tensor.is_floating_point()]
    if strange or not all_finite(classifier.values()):
        raise CorruptCheckpointError(
            "A mixture's classifier holds finite floating-point numbers.",
            received=f"{path}: {', '.join(strange) + ' of another dtype' if strange else 'infinite ones, or NaN'}",
            remedy="Download the mixture again, or train it again.",
        )
    return classifier
