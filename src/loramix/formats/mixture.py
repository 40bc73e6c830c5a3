"""A mixture as read from files, and what all formats of mixtures share: choosing experts, checking the router.

E: experts. L: adapted layers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loramix.config.base import PeftType
from loramix.config.xlora import UNIFORM, XLoraConfig, as_adapters
from loramix.errors import (
    AdapterMismatchError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
)
from loramix.experts.adapter import Adapter
from loramix.files.hub import from_anywhere
from loramix.files.tensors import all_finite
from loramix.routers import RouterSizes, router_class
from loramix.routers.router import Shapes


@dataclass(frozen=True)
class MixtureCheckpoint:
    """The content of a mixture's files.

    Args:
        config: its `adapters` names the experts, in order.
        router: the router's tensors by their names in its `state_dict`, such as "layers.0.weight".
        experts: in the order of `config.adapters`.
        base_weights: parameter name -> the weight of the base model that is the mixture's own: an embedding or a head
            that came with an expert or was trained.
        layers: the paths of the L adapted layers in the order of their numbers, where the base model is known.
        replaced: the names of the experts that are not the checkpoint's own.
    """

    config: XLoraConfig
    router: Mapping[str, Tensor]
    experts: Sequence[Adapter]
    base_weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    layers: Sequence[str] = ()
    replaced: Sequence[str] = ()

    @property
    def num_layers(self) -> int:
        """L: the number of modules that at least one expert adapts."""
        return len({path for expert in self.experts for path in expert.weights})

    @property
    def base_model(self) -> str | None:
        """The base model's identifier: the mixture's, or that of the first expert that has one."""
        bases = (self.config.base_model_name_or_path, *(e.config.base_model_name_or_path for e in self.experts))
        return next((base for base in bases if base), None)

    def router_shapes(self) -> Shapes | None:
        """The names and shapes of the router's tensors, by the configuration and the experts; None as `_shapes`."""
        return _shapes(self.config, self.num_layers, len(self.experts))


def _shapes(config: XLoraConfig, layers: int, experts: int) -> Shapes | None:
    """The router's tensors, as far as files tell.

    None for a router that reads the low-rank activation: its shapes follow from the order of the layers, which the base
    model knows.
    """
    kind = router_class(config)
    if kind.reads == "low-rank activation":
        return None
    return kind.shapes(config, RouterSizes(config.hidden_size, layers, experts))


def select_experts(
    saved: XLoraConfig,
    adapters: Mapping[str, str | os.PathLike[str]] | None,
    config: XLoraConfig | None,
    source: str,
) -> tuple[XLoraConfig, tuple[str, ...]]:
    """The configuration and the experts of a mixture that is loaded with `adapters=` or `config=`.

    Args:
        saved: the saved configuration.
        adapters: experts to use instead of the saved ones. Names of the checkpoint replace those experts, and the
            others stay. If all names are new and there are as many as experts, they replace all experts in order.
        config: a configuration to use instead of the saved one, with the same router. If `adapters` is not given, the
            experts in which it differs from the saved one replace those.
        source: the checkpoint, for messages.

    Returns:
        a new configuration, whose `adapters` has the names and places of all experts; and the names of those that are
        not the checkpoint's own.

    Raises:
        ConfigurationError: no experts; or `adapters` that is not a mapping, has a wrong number of names, or mixes names
            of the checkpoint with new ones.
        AdapterNameError: new names that cannot be names of folders, or that clash.
    """
    if adapters is None and config is not None:
        adapters = {n: place for n, place in config.adapters.items() if saved.adapters.get(n) != place} or None
    chosen = copy.deepcopy(config or saved)
    chosen.adapters = _replaced(saved.adapters, adapters)
    names = dict(zip(saved.adapters, chosen.adapters, strict=False))
    chosen.elsewhere = {part: _renamed(given, names) for part, given in chosen.elsewhere.items()}
    if not chosen.adapters:
        raise ConfigurationError(
            "A mixture names its experts.",
            received=f"adapters={saved.adapters!r} in {source!r}",
            remedy='Say what they are: from_pretrained(…, adapters={"name": "path or Hub id"}), or correct the file.',
        )
    return chosen, tuple(adapters or ())


def _renamed(given: Any, names: Mapping[str, str]) -> Any:
    """The scalings given elsewhere, with other names of the experts."""
    return given if given == UNIFORM else {names.get(name, name): value for name, value in given.items()}


def _replaced(saved: Mapping[str, str], given: Mapping[str, object] | None) -> dict[str, str]:
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


def check_before_experts(config: XLoraConfig, router: Mapping[str, Tensor], source: str) -> None:
    """Check what does not depend on the experts, before they are read and perhaps downloaded.

    Raises:
        IncompleteCheckpointError: a tensor of the router is missing.
        CorruptCheckpointError: tensors that are not floating-point, or numbers that are not finite.
    """
    strange = [name for name, tensor in router.items() if not tensor.is_floating_point()]
    if strange or not all_finite(router.values()):
        raise CorruptCheckpointError(
            "A mixture's router holds finite floating-point numbers.",
            received=f"{source}: {', '.join(strange) + ' of another dtype' if strange else 'infinite ones, or NaN'}",
            remedy="Download the mixture again, or train it again.",
        )
    any_layers = _shapes(config, 1, len(config.adapters))  # the names are the same for every L
    _require_all(any_layers or (), config, router, source)


def check_router(checkpoint: MixtureCheckpoint, source: str, replaced: Collection[str] = ()) -> None:
    """Check the names and shapes of a router's tensors against the configuration and the experts.

    Args:
        checkpoint: the mixture, with its experts.
        source: the router's file, for messages.
        replaced: the names of the experts that are not the checkpoint's own.

    Raises:
        IncompleteCheckpointError: missing tensors.
        CorruptCheckpointError: unexpected tensors, or unexpected shapes.
        AdapterMismatchError: unexpected shapes in a layerwise mixture with replaced experts.
    """
    config, expected = checkpoint.config, checkpoint.router_shapes()
    if expected is None:
        return
    _require_all(expected, config, checkpoint.router, source)
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.router.items()}
    wrong = [name for name in found if found[name] != expected.get(name)]
    if not wrong:
        return
    shown = "; ".join(f"{name} expected {expected.get(name, 'none')}, found {found[name]}" for name in wrong)
    if replaced and config.layerwise_scalings:
        raise AdapterMismatchError(
            "Experts that replace those of a layerwise mixture adapt the same layers.",
            received=f"{', '.join(map(repr, replaced))}, with which {checkpoint.num_layers} layers are adapted; router "
            f"in {source}: {shown}",
            remedy="Use experts with the target_modules of those that they replace, or build a new mixture.",
        )
    raise CorruptCheckpointError(
        "The shapes of a router follow from the configuration and the experts.",
        received=f"{source}, with {len(checkpoint.experts)} experts on {checkpoint.num_layers} layers: {shown}",
        remedy="Correct the configuration (hidden_size, xlora_depth, xlora_size, xlora_dropout_p, "
        "layerwise_scalings, adapters), or save the mixture again.",
    )


def beyond_the_classifier(config: XLoraConfig) -> list[str]:
    """The settings of a mixture that X-LoRA's classifier and gating do not have, as texts for a message."""
    saved = config.to_dict()  # leaves out the defaults of these
    return [f"{name}={saved[name]!r}" for name in ("router", "gating", "gating_settings", "elsewhere") if name in saved]


def selects_in_the_scaling_pass(config: XLoraConfig) -> bool:
    """Whether PEFT and the original library select experts in the scaling pass, among equal values, as we do not."""
    selects = config.top_k_lora is not None and config.top_k_lora < len(config.adapters)
    return selects and config.scaling_pass_value != 0


def beyond_linear(expert: Adapter) -> list[str]:
    """What an expert has beside two matrices for each linear layer, as texts for a message."""
    config = expert.config
    found = [f"{name}=True" for name in ("use_dora", "lora_bias") if getattr(config, name)]
    found += [f"target_parameters={config.target_parameters}"] if config.target_parameters else []
    found += [f"the embedding {path!r}" for path, weights in expert.weights.items() if weights.embedding]
    return found + [f"the convolution {path!r}" for path, weights in expert.weights.items() if weights.A.ndim > 2]


def _require_all(names: Iterable[str], config: XLoraConfig, router: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in names if name not in router]
    if not missing:
        return
    received, remedy = f"{source} without {', '.join(missing)}", "Train the mixture again with loramix"
    if config.peft_type is PeftType.XLORA:
        saved = f"; this one is of PEFT {config.peft_version}" if config.peft_version else ""
        received += f"; PEFT 0.20 to 0.21.2 drop such tensors when they save an X-LoRA model{saved}"
        remedy = (
            "If PEFT's model is still in memory, write its classifier over the file: safetensors.torch.save_file("
            "{'base_model.internal_xlora_classifier.' + name: tensor for name, tensor in "
            f"model.base_model.internal_xlora_classifier.state_dict().items()}}, {source!r}). Otherwise train the "
            "mixture again, with loramix or with PEFT 0.19.1 or older"
        )
    raise IncompleteCheckpointError(
        "A mixture's file holds every tensor of its router.",
        received=received,
        remedy=f"{remedy}; the experts themselves can be used in a new mixture.",
    )
