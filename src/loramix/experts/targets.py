"""The modules that an expert adapts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from loramix.config.lora import LoraConfig
from loramix.config.wrappers import unwrapped
from loramix.errors import ConfigurationError
from loramix.experts.base_layers import Kind, kind_of
from loramix.experts.blocks import with_matrices

ALL_LINEAR = "all-linear"


def is_target(config: LoraConfig, path: str) -> bool:
    """Whether the expert adapts the module at `path`, by PEFT's rules.

    Excluded modules come first. An expression must match the whole path. A name matches the path that equals it,
    whatever `layers_to_transform` says, and paths that end in "." and the name, where the block's index is among
    `layers_to_transform`. The index is the first number that follows a name from `layers_pattern`; without
    `layers_pattern` it is the first number below at least two names.

    Args:
        config: the expert's configuration; `target_modules` is not "all-linear".
        path: as in `base.named_modules()`.
    """
    targets = config.target_modules
    if targets is None or is_excluded(config, path):
        return False
    if isinstance(targets, str) or path in targets:
        return _matches(targets, path)
    return _matches(targets, path) and _is_in_layers(config, path)


def is_excluded(config: LoraConfig, path: str) -> bool:
    """Whether `exclude_modules` matches the module at `path`."""
    return bool(config.exclude_modules) and _matches(config.exclude_modules, path)


def _matches(modules: Iterable[str] | str, path: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in modules)


def _is_in_layers(config: LoraConfig, path: str) -> bool:
    blocks = config.layers_to_transform
    if blocks is None or blocks == []:
        return True
    index = _block_index(config.layers_pattern, path)
    return index == blocks if isinstance(blocks, int) else index in blocks


def _block_index(layers_pattern: list[str] | str | None, path: str) -> int | None:
    if layers_pattern:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns]
    else:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    found = (re.match(expression, path) for expression in expressions)
    return next((int(match[match.re.groups]) for match in found if match), None)


def adaptable(modules: Mapping[str, nn.Module]) -> dict[str, Kind]:
    """The kinds of the modules that experts can adapt, by path."""
    return {path: kind for path, module in modules.items() if (kind := kind_of(module)) is not None}


def targeted(modules: Mapping[str, nn.Module], kinds: Mapping[str, Kind], config: LoraConfig) -> list[str]:
    """The paths of the modules that `target_modules` or `target_parameters` matches and experts can adapt.

    "all-linear" matches every linear layer but the head's; None matches nothing. Parameters of mixture-of-experts
    blocks, and what chooses their experts, are matched by `target_parameters` alone.

    Args:
        modules: the base model's modules by path.
        kinds: those that experts can adapt, by `adaptable`.
        config: the expert's configuration.
    """

    def matches(path: str, kind: Kind) -> bool:
        if config.targets_parameter(path if kind == "block" else f"{path}.weight"):
            return True
        names = {path, unwrapped(path)}
        if config.target_modules == ALL_LINEAR:
            excluded = any(is_excluded(config, name) for name in names)
            return kind == "linear" and not in_head(modules, path) and not excluded
        return kind not in ("block", "gate") and any(is_target(config, name) for name in names)

    return [path for path, kind in kinds.items() if matches(path, kind)]


def new_targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The paths of the modules that a new expert adapts; otherwise as `targeted`.

    Raises:
        ConfigurationError: `target_modules` and `target_parameters` match nothing in this model, or are missing.
    """
    modules = with_matrices(model)
    paths = targeted(modules, adaptable(modules), config)
    if not paths:
        raise ConfigurationError(
            "target_modules names at least one module of the base model.",
            received=f"target_modules={config.target_modules!r}"
            + (f", target_parameters={config.target_parameters!r}" if config.target_parameters else "")
            + f" for a {type(model).__name__}",
            remedy='write target_modules="all-linear", or names such as ["q_proj", "v_proj"]',
        )
    return paths


def carrier_path(modules: Mapping[str, nn.Module], path: str) -> str:
    """The path of the nearest `PreTrainedModel` above a module: the part of the model that runs the passes for it.

    Args:
        modules: the base model's modules by path; the model itself at "".
        path: the module's.
    """
    while path:
        path = path.rpartition(".")[0]
        if isinstance(modules[path], PreTrainedModel):
            return path
    return path


def in_head(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a module belongs to what runs after the passes, such as the head; arguments as for `carrier_path`."""
    root = cast(PreTrainedModel, modules[""])
    is_around = root.base_model is not root or root.config.is_encoder_decoder  # T5 has its head beside its two parts
    return is_around and carrier_path(modules, path) == ""
