"""Descriptions of experts and mixtures, from their files alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loramix.config.base import TaskType
from loramix.experts.adapter import WRAPPED, Adapter, refuse_infinite
from loramix.files.hub import HubOptions
from loramix.files.location import Location
from loramix.formats.load import Kind, kind_at, read_expert, read_mixture
from loramix.formats.mixture import MixtureCheckpoint
from loramix.routers import router_class


@dataclass(frozen=True)
class ExpertDescription:
    """One expert.

    Args:
        name: its name in the mixture; for a single expert, the folder's name.
        source: the folder or Hub identifier that it was read from.
        base_model: identifier of its base model, if its configuration has it.
        ranks: the distinct ranks of its modules, in ascending order.
        alpha: `lora_alpha`.
        targets: the distinct names of its modules, such as q_proj, and of its parameters, such as gate_up_proj.
        modules: number of modules and parameters that it adapts.
        parameters: number of its parameters.
        dtypes: the distinct dtypes of its tensors.
        variants: those of rslora, dora and bias that it uses.
    """

    name: str
    source: str
    base_model: str | None
    ranks: tuple[int, ...]
    alpha: float
    targets: tuple[str, ...]
    modules: int
    parameters: int
    dtypes: tuple[str, ...]
    variants: tuple[str, ...]


@dataclass(frozen=True)
class RouterDescription:
    """The router of a mixture.

    Args:
        kind: "classifier" is X-LoRA's.
        parameters: number of its parameters.
        layerwise: whether each adapted layer has its own scalings.
        top_k: number of experts selected for each token; None for all.
        settings: what else describes a router of this kind, by name: depth and hidden_size of a classifier.
    """

    kind: str
    parameters: int
    layerwise: bool
    top_k: int | None
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, in JSON's types; the settings beside the rest."""
        found = asdict(self)
        return found | found.pop("settings")


@dataclass(frozen=True)
class Description:
    """A checkpoint.

    Args:
        kind: expert or mixture.
        path: the identifier that was given.
        base_model: identifier of the base model, if a configuration has it.
        task_type: the base model's task, if the configuration has it.
        num_layers: L, the number of modules that at least one expert adapts.
        experts: the E experts.
        router: None for a single expert.
    """

    kind: Kind
    path: str
    base_model: str | None
    task_type: str | None
    num_layers: int
    experts: tuple[ExpertDescription, ...]
    router: RouterDescription | None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts)

    def to_dict(self) -> dict[str, Any]:
        """The description in JSON's types."""
        router = None if self.router is None else self.router.to_dict()
        return {**asdict(self), "kind": self.kind.value, "num_experts": self.num_experts, "router": router}


def describe(identifier: str | os.PathLike[str], options: HubOptions | None = None) -> Description:
    """Describe a checkpoint without its base model.

    Raises:
        CheckpointError, AdapterError, ConfigurationError: what `load_adapter` and `load_mixture` raise.
    """
    location = Location(identifier, options or HubOptions())
    return describe_content(_read(location), os.fspath(location.identifier))


def _read(location: Location) -> Adapter | MixtureCheckpoint:
    if kind_at(location) is Kind.MIXTURE:
        return read_mixture(location)
    place = location.options.subfolder or os.fspath(location.identifier)
    return read_expert(location, os.path.basename(os.path.abspath(place)))  # noqa: PTH100, PTH119


def describe_content(content: Adapter | MixtureCheckpoint, path: str = "") -> Description:
    """Describe what files hold, or will hold.

    Args:
        content: a mixture or one expert.
        path: its identifier, if it has one.
    """
    return _mixture(content, path) if isinstance(content, MixtureCheckpoint) else _single_expert(content, path)


def _mixture(mixture: MixtureCheckpoint, path: str) -> Description:
    config = mixture.config
    kind = router_class(config)
    return Description(
        Kind.MIXTURE,
        path,
        base_model=mixture.base_model,
        task_type=_plain(config.task_type),
        num_layers=mixture.num_layers,
        experts=tuple(_expert(expert) for expert in mixture.experts),
        router=RouterDescription(
            kind=config.router,
            parameters=sum(tensor.numel() for tensor in mixture.router.values()),
            layerwise=config.layerwise_scalings or kind.reads == "low-rank activation",
            top_k=config.top_k_lora,
            settings=dict(kind.describe(config)),
        ),
    )


def _single_expert(expert: Adapter, path: str) -> Description:
    return Description(
        Kind.EXPERT,
        path,
        base_model=expert.config.base_model_name_or_path,
        task_type=_plain(expert.config.task_type),
        num_layers=len(expert.weights),
        experts=(_expert(expert),),
        router=None,
    )


def _expert(expert: Adapter) -> ExpertDescription:
    config, weights = expert.config, expert.weights
    refuse_infinite(expert.name, weights)
    of_blocks = {path for path, module in weights.items() if path.endswith(WRAPPED) or module.rank != expert.rank(path)}
    parameters = (config.target_parameters or []) if of_blocks else []  # the file does not tell which is which
    own = {path: module for path, module in weights.items() if path not in of_blocks}
    variants = {"rslora": config.use_rslora, "dora": config.use_dora, "bias": config.lora_bias}
    return ExpertDescription(
        name=expert.name,
        source=expert.source,
        base_model=config.base_model_name_or_path,
        ranks=tuple(sorted({*(module.rank for module in own.values()), *map(expert.rank, parameters)})),
        alpha=config.lora_alpha,
        targets=tuple(sorted({path.removesuffix(".weight").rpartition(".")[2] for path in [*own, *parameters]})),
        modules=len(weights),
        parameters=sum(module.num_parameters for module in weights.values()),
        dtypes=tuple(sorted({str(module.A.dtype).removeprefix("torch.") for module in weights.values()})),
        variants=tuple(name for name, used in variants.items() if used),
    )


def _plain(task_type: str | None) -> str | None:
    return None if task_type is None else TaskType(task_type).value
