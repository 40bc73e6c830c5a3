"""What a mixture cannot carry of its experts, left out on demand."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.config.lora import LoraConfig
from loramix.errors import AdapterMismatchError, UnsupportedAdapterError
from loramix.experts.adapter import Adapter, LoraWeights
from loramix.experts.base_layers import why_unadaptable
from loramix.experts.base_weights import check_base_weights, conflicting, without_names
from loramix.experts.blocks import with_matrices


def without_unsupported(
    model: PreTrainedModel, adapters: Sequence[Adapter], chosen: str | None = None
) -> list[Adapter]:
    """The experts without modules that cannot be adapted, and without weights that cannot be the base model's.

    Weights in which experts disagree are left out of all of them, unless one is chosen. A warning names what is left
    out of each expert. An expert of which nothing would be left stays as it is.

    Args:
        model: the base model.
        adapters: the experts, by the base model's names (`on_base`).
        chosen: the name of the expert whose weights are used where experts disagree.
    """
    modules = with_matrices(model)
    found = [_adaptable(model, modules, adapter) for adapter in adapters]
    disputed = conflicting(model, found, chosen)
    found = [without_names(model, adapter, disputed) for adapter in found]
    for before, after in zip(adapters, found, strict=True):
        left_out = [path for path in before.weights if path not in after.weights]
        left_out += [name for name in before.base_weights if name not in after.base_weights]
        if left_out:
            warnings.warn(
                f"Of expert {before.name!r} {len(left_out)} parts are left out, which this mixture cannot carry: "
                f"{', '.join(left_out)}.",
                stacklevel=4,
            )
    return found


def _adaptable(model: PreTrainedModel, modules: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """The expert without the modules and weights for which it would be refused by itself."""
    left_out = [path for path, weights in adapter.weights.items() if _why_not(modules.get(path), path, weights)]
    if len(left_out) == len(adapter.weights):
        left_out = []
    names = [name for name, saved in adapter.base_weights.items() if not _can_be(model, adapter, {name: saved})]
    kept = {path: weights for path, weights in adapter.weights.items() if path not in left_out}
    config = _excluding(adapter.config, left_out) if left_out else adapter.config
    return without_names(model, replace(adapter, config=config, weights=kept), names)


def _why_not(module: nn.Module | None, path: str, weights: LoraWeights) -> str | None:
    if module is None:
        return "the base model has no such module"
    return why_unadaptable(module, path, dora=weights.magnitude is not None)


def _can_be(model: PreTrainedModel, adapter: Adapter, weights: dict[str, Tensor]) -> bool:
    try:
        check_base_weights(model, replace(adapter, base_weights=weights))
    except (AdapterMismatchError, UnsupportedAdapterError):
        return False
    return True


def _excluding(config: LoraConfig, paths: Sequence[str]) -> LoraConfig:
    """A configuration that does not name these modules: what is saved is the same expert."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        return replace(config, exclude_modules=f"(?:{excluded})|" + "|".join(map(re.escape, paths)))
    return replace(config, exclude_modules={*(excluded or ()), *paths})
