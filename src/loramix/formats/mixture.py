"""A mixture as its files hold it, and what is the same in every format: whose experts it has, which router tensors.

E: experts. L: adapted layers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from loramix.config.xlora import XLoraConfig, as_adapters
from loramix.errors import (
    AdapterMismatchError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
)
from loramix.experts.adapter import Adapter
from loramix.files.hub import from_anywhere
from loramix.files.tensors import all_finite
from loramix.routers.classifier import XLoraClassifier

CLASSIFIER = "classifier"


@dataclass(frozen=True)
class MixtureCheckpoint:
    """What a mixture's files hold.

    Args:
        config: its `adapters` names the experts, in order.
        router: the tensors of its router by their names in it, such as "layers.0.weight".
        experts: in the order of `config.adapters`.
    """

    config: XLoraConfig
    router: Mapping[str, Tensor]
    experts: Sequence[Adapter]

    @property
    def num_layers(self) -> int:
        """L: the modules that at least one expert adapts."""
        return len({path for expert in self.experts for path in expert.weights})

    def router_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that the router has, by the configuration and the experts."""
        return router_shapes(self.config, layers=self.num_layers, experts=len(self.experts))


def router_attribute(config: XLoraConfig) -> str:
    """The name of the router in the model, which is also the prefix of its tensors in a file."""
    return "internal_xlora_classifier" if config.router == CLASSIFIER else "internal_xlora_router"


def router_shapes(config: XLoraConfig, *, layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a mixture's router by name, and their shapes.

    Raises:
        ConfigurationError: a kind of router that is not known.
    """
    if config.router != CLASSIFIER:
        raise ConfigurationError(
            f"router must be {CLASSIFIER!r}.",
            received=f"router={config.router!r}",
            remedy="correct the name, or install the version of loramix that saved the mixture",
        )
    return XLoraClassifier.tensors(config, layers=layers, experts=experts)


def select_experts(
    saved: XLoraConfig,
    adapters: Mapping[str, str | os.PathLike[str]] | None,
    config: XLoraConfig | None,
    source: str,
) -> tuple[XLoraConfig, tuple[str, ...]]:
    """The configuration to load a mixture by, after `from_pretrained(adapters=…, config=…)`.

    Args:
        saved: the checkpoint's own configuration.
        adapters: experts to use instead. Names of the checkpoint replace those experts, and the others stay. New
            names only, as many as the checkpoint has experts, replace all of them in order and become the names.
        config: a configuration to use instead, for the same router. Experts that it names otherwise than the saved
            one count as `adapters`, where these are not given.
        source: the checkpoint, for messages.

    Returns:
        A configuration of its own, whose `adapters` says where each expert is; and the names of those that replace
        the checkpoint's.

    Raises:
        ConfigurationError: no experts; `adapters` that is no mapping, of a wrong count, or with some names of the
            checkpoint and some new ones.
        AdapterNameError: new names that cannot be folders, or that clash.
    """
    if adapters is None and config is not None:
        adapters = {n: place for n, place in config.adapters.items() if saved.adapters.get(n) != place} or None
    chosen = copy.deepcopy(config or saved)
    chosen.adapters = _replaced(saved.adapters, adapters)
    if not chosen.adapters:
        raise ConfigurationError(
            "A mixture names its experts.",
            received=f"adapters={saved.adapters!r} in {source!r}",
            remedy='Say what they are: from_pretrained(…, adapters={"name": "path or Hub id"}), or correct the file.',
        )
    return chosen, tuple(adapters or ())


def _replaced(saved: Mapping[str, str], given: Mapping[str, str | os.PathLike[str]] | None) -> dict[str, str]:
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
    """Check what can be known of a router before the experts are read, which may have to be downloaded.

    Raises:
        IncompleteCheckpointError: a classifier without some of its tensors.
        CorruptCheckpointError: tensors of another kind than floating-point, or numbers that are not finite.
    """
    strange = [name for name, tensor in router.items() if not tensor.is_floating_point()]
    if strange or not all_finite(router.values()):
        raise CorruptCheckpointError(
            "A mixture's router holds finite floating-point numbers.",
            received=f"{source}: {', '.join(strange) + ' of another dtype' if strange else 'infinite ones, or NaN'}",
            remedy="Download the mixture again, or train it again.",
        )
    if config.router == CLASSIFIER:  # whose tensors are the same for every L, but for the shape of the last
        _require_all(router_shapes(config, layers=1, experts=len(config.adapters)), config, router, source)


def check_router(checkpoint: MixtureCheckpoint, source: str, replaced: Collection[str] = ()) -> None:
    """Check that a router's tensors are those that the configuration and the experts ask for.

    Args:
        checkpoint: with its experts: L is the number of layers that they adapt.
        source: the router's file, for messages.
        replaced: the names of experts that are not the checkpoint's own.

    Raises:
        IncompleteCheckpointError: some are missing.
        CorruptCheckpointError: more than those, or other shapes.
        AdapterMismatchError: other shapes, where experts that adapt other layers may be the reason.
    """
    config, expected = checkpoint.config, checkpoint.router_shapes()
    _require_all(expected, config, checkpoint.router, source)
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.router.items()}
    wrong = [name for name in found if found[name] != expected.get(name)]
    if not wrong:
        return
    shown = "; ".join(f"{name} expected {expected.get(name, 'none')}, found {found[name]}" for name in wrong)
    if replaced and config.layerwise_scalings:
        raise AdapterMismatchError(
            "Experts that replace those of a layerwise mixture adapt the same layers.",
            received=f"{', '.join(map(repr, replaced))}, which make it {checkpoint.num_layers} layers, for the router "
            f"in {source}: {shown}",
            remedy="Use experts with the target_modules of those that they replace, or build a new mixture.",
        )
    raise CorruptCheckpointError(
        "A mixture's router has the shapes that its configuration and its experts ask for.",
        received=f"{source}, with {len(checkpoint.experts)} experts on {checkpoint.num_layers} layers: {shown}",
        remedy="Correct adapter_config.json (hidden_size, xlora_depth, xlora_size, xlora_dropout_p, "
        "layerwise_scalings, adapters), or save the mixture again.",
    )


def _require_all(names: Iterable[str], config: XLoraConfig, router: Mapping[str, Tensor], source: str) -> None:
    missing = [name for name in names if name not in router]
    if not missing:
        return
    dropped = "; PEFT 0.20 to 0.21.2 drop such tensors when they save an X-LoRA model"
    older = ", or save it again with PEFT 0.19.1 or older"
    by_peft = config.router == CLASSIFIER
    raise IncompleteCheckpointError(
        "A mixture's file holds every tensor of its router.",
        received=f"{source} without {', '.join(missing)}{dropped if by_peft else ''}",
        remedy=f"Train the mixture again with loramix{older if by_peft else ''}; the experts themselves can be used in "
        "a new mixture.",
    )
