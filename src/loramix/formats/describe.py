"""What a folder is, from its files alone: an expert or a mixture, of which base model, with what in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from loramix.config.base import PeftConfig
from loramix.config.xlora import XLoraConfig
from loramix.experts.adapter import Adapter
from loramix.files.hub import HubOptions
from loramix.formats.lora import load_adapter
from loramix.formats.xlora import load_mixture


class Kind(str, Enum):  # noqa: UP042 - equal to its string, and printed as JSON like one
    """What a checkpoint is."""

    EXPERT = "expert"
    MIXTURE = "mixture"


@dataclass(frozen=True)
class ExpertDescription:
    """One expert.

    Args:
        name: in the mixture; for a lone expert the folder's.
        source: where it was read from.
        base_model: identifier of the base model it was trained for, as far as its configuration says.
        ranks: the different r of its modules, in ascending order.
        alpha: `lora_alpha`.
        targets: the different last names of its modules, such as q_proj.
        modules: number of its modules.
        parameters: number of its parameters.
        dtypes: of its tensors.
        variants: rslora, dora, bias, where used.
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
    """The classifier of a mixture.

    Args:
        parameters: number of its parameters.
        depth: linear layers.
        hidden_size: H, its input.
        layerwise: scalings of their own for each adapted layer.
        top_k: experts kept for each token; None keeps all.
    """

    parameters: int
    depth: int
    hidden_size: int
    layerwise: bool
    top_k: int | None


@dataclass(frozen=True)
class Description:
    """A checkpoint.

    Args:
        kind: expert or mixture.
        path: the identifier that was asked about.
        base_model: identifier of the base model, as far as the configurations say.
        task_type: what the base model is used for, as far as the configuration says.
        num_layers: L, the modules that at least one expert adapts.
        experts: E of them; one for a lone expert.
        router: None for a lone expert.
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
        """Everything in JSON's types."""
        return {**asdict(self), "kind": self.kind.value, "num_experts": self.num_experts}


def detect(identifier: str | os.PathLike[str], options: HubOptions | None = None) -> Kind:
    """Say what a checkpoint is, by its configuration.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no adapter in it.
        CorruptCheckpointError: a configuration that cannot be read.
        UnsupportedAdapterError: neither LoRA nor X-LoRA.
    """
    config = PeftConfig.from_pretrained(identifier, **_kwargs(options))
    return Kind.MIXTURE if isinstance(config, XLoraConfig) else Kind.EXPERT


def describe(identifier: str | os.PathLike[str], options: HubOptions | None = None) -> Description:
    """Describe a checkpoint without its base model.

    Raises:
        CheckpointError, AdapterError, ConfigurationError: what `load_adapter` and `load_mixture` raise.
    """
    if detect(identifier, options) is Kind.EXPERT:
        return _describe_expert(identifier, options)
    mixture = load_mixture(identifier, options)
    config = mixture.config
    router = RouterDescription(
        parameters=sum(tensor.numel() for tensor in mixture.classifier.values()),
        depth=config.xlora_depth,
        hidden_size=config.hidden_size,
        layerwise=config.layerwise_scalings,
        top_k=config.top_k_lora,
    )
    bases = (config.base_model_name_or_path, *(e.config.base_model_name_or_path for e in mixture.experts))
    return Description(
        Kind.MIXTURE,
        os.fspath(identifier),
        base_model=next((base for base in bases if base), None),
        task_type=_plain(config.task_type),
        num_layers=len({path for expert in mixture.experts for path in expert.weights}),
        experts=tuple(_expert(expert) for expert in mixture.experts),
        router=router,
    )


def _describe_expert(identifier: str | os.PathLike[str], options: HubOptions | None) -> Description:
    place = (options.subfolder if options else None) or os.fspath(identifier)
    expert = load_adapter(os.path.basename(os.path.abspath(place)), identifier, options)  # noqa: PTH100, PTH119
    return Description(
        Kind.EXPERT,
        os.fspath(identifier),
        base_model=expert.config.base_model_name_or_path,
        task_type=_plain(expert.config.task_type),
        num_layers=len(expert.weights),
        experts=(_expert(expert),),
        router=None,
    )


def _expert(expert: Adapter) -> ExpertDescription:
    config, weights = expert.config, expert.weights
    variants = {"rslora": config.use_rslora, "dora": config.use_dora, "bias": config.lora_bias}
    return ExpertDescription(
        name=expert.name,
        source=expert.source,
        base_model=config.base_model_name_or_path,
        ranks=tuple(sorted({module.rank for module in weights.values()})),
        alpha=config.lora_alpha,
        targets=tuple(sorted({path.rpartition(".")[2] for path in weights})),
        modules=len(weights),
        parameters=sum(module.num_parameters for module in weights.values()),
        dtypes=tuple(sorted({str(module.A.dtype).removeprefix("torch.") for module in weights.values()})),
        variants=tuple(name for name, used in variants.items() if used),
    )


def _plain(task_type: str | None) -> str | None:
    return str(getattr(task_type, "value", task_type)) if task_type is not None else None


def _kwargs(options: HubOptions | None) -> Mapping[str, Any]:
    return {} if options is None else {entry.name: getattr(options, entry.name) for entry in fields(options)}
