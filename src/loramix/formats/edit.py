"""Edits of a mixture as data: add, remove, replace, rename and reorder experts, without a base model.

Each function returns a new mixture and leaves the given one as it is. Tensors that stay are the same bits, so an edit
changes no other expert's logit. Where the router's kind cannot edit its experts one by one, it says so
(`Router.expert_axes`).

L: adapted layers. E: experts.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loramix.config.names import check_expert_names
from loramix.config.xlora import UNIFORM
from loramix.errors import AdapterMismatchError, AdapterNameError, ConfigurationError, UnsupportedOperationError
from loramix.experts.adapter import Adapter, BlockWeights, LoraWeights, of_another_base
from loramix.files.hub import from_anywhere
from loramix.formats.mixture import MixtureCheckpoint
from loramix.routers import RouterSizes, gating_of, router_class


def add_expert(
    mixture: MixtureCheckpoint, expert: Adapter, column: Mapping[str, Tensor] | None = None
) -> MixtureCheckpoint:
    """The mixture with one more expert, behind the others.

    Args:
        mixture: the mixture.
        expert: the new expert, by its name.
        column: its part of each of the router's tensors that hold experts: (…) without their axis, layers first where
            the axis holds both. None: the expert is cold: its logit is below the mean of the others' by so much that
            the output stays as it was, within rounding (`Gating.cold`).

    Raises:
        AdapterNameError: a name that cannot be a folder's, or that clashes.
        AdapterMismatchError: an expert of another base model; or, with scalings for each layer, of other layers.
        ConfigurationError: tensors that are not those of one expert, or not finite; a gating that gives each expert a
            positive scaling, so that none can be cold.
        UnsupportedOperationError: a router whose experts are not edited one by one.
    """
    check_expert_names([*mixture.config.adapters, expert.name])
    _check_sizes(mixture.experts, expert)
    columns = _columns(mixture)
    new = _cold(mixture, columns) if column is None else _checked(column, columns)
    router = {name: torch.cat([each, new[name].to(each).unsqueeze(-1)], dim=-1) for name, each in columns.items()}
    config = copy.copy(mixture.config)
    share = {name: 1 / len(config.adapters) for name in config.adapters}
    config.elsewhere = {part: share if given == UNIFORM else given for part, given in config.elsewhere.items()}
    return _edited(replace(mixture, config=config), [*mixture.experts, expert], router, added=expert)


def remove_expert(mixture: MixtureCheckpoint, name: str) -> MixtureCheckpoint:
    """The mixture without an expert. Where `top_k_lora` kept all experts, it still does.

    Raises:
        AdapterNameError: no such expert.
        ConfigurationError: the only expert.
        AdapterMismatchError: with scalings for each layer, an expert that alone adapts some layers.
        UnsupportedOperationError: a router whose experts are not edited one by one.
    """
    place = _place(mixture, name)
    if len(mixture.experts) == 1:
        raise ConfigurationError(
            "A mixture keeps at least one expert.",
            received=f"the only expert, {name!r}, to be removed",
            remedy="add another expert first, or use the base model",
        )
    kept = [number for number in range(len(mixture.experts)) if number != place]
    return _selected(mixture, kept)


def replace_expert(
    mixture: MixtureCheckpoint, name: str, expert: Adapter, column: Mapping[str, Tensor] | None = None
) -> MixtureCheckpoint:
    """The mixture with other matrices for an expert, which keeps its name and place.

    Args:
        mixture: the mixture.
        name: the expert that is replaced.
        expert: what replaces it, whatever its name.
        column: as for `add_expert`; None keeps the router as it is.

    Raises:
        AdapterNameError, AdapterMismatchError, ConfigurationError: as for `add_expert`; no such expert.
        UnsupportedOperationError: a router that reads the experts' own activations, without `column`.
    """
    place, expert = _place(mixture, name), replace(expert, name=name)
    others = [other for other in mixture.experts if other.name != name]
    _check_sizes(others, expert)
    if column is None and router_class(mixture.config).reads == "low-rank activation":
        raise UnsupportedOperationError(
            "A router that reads the experts' own activations is fitted to them.",
            received=f"another {name!r} for router={mixture.config.router!r}",
            remedy="give the expert's tensors (column=), or build a mixture with it and fit its router again",
        )
    columns = _columns(mixture) if column is not None else {}
    router: dict[str, Tensor] = {}
    if column is not None:
        new = _checked(column, columns)
        router = {
            key: each.index_copy(-1, torch.tensor([place]), new[key].to(each).unsqueeze(-1))
            for key, each in columns.items()
        }
    experts = [expert if other.name == name else other for other in mixture.experts]
    return _edited(mixture, experts, router, added=expert)


def rename_expert(mixture: MixtureCheckpoint, old: str, new: str) -> MixtureCheckpoint:
    """The mixture with another name for an expert, in `elsewhere` too.

    Raises:
        AdapterNameError: no such expert, a name that cannot be a folder's, or one that clashes.
    """
    _place(mixture, old)
    names = {name: new if name == old else name for name in mixture.config.adapters}
    check_expert_names(names.values())
    config = copy.deepcopy(mixture.config)
    config.adapters = {names[name]: place for name, place in config.adapters.items()}
    config.elsewhere = {
        part: given if given == UNIFORM else {names[name]: value for name, value in given.items()}
        for part, given in config.elsewhere.items()
    }
    experts = [replace(expert, name=names[expert.name]) for expert in mixture.experts]
    return replace(mixture, config=config, experts=experts)


def reorder_experts(mixture: MixtureCheckpoint, order: Sequence[str]) -> MixtureCheckpoint:
    """The mixture with its experts in another order.

    Args:
        mixture: the mixture.
        order: the names of all experts.

    Raises:
        AdapterNameError: not the names of all experts, each once.
        UnsupportedOperationError: a router whose experts are not edited one by one.
    """
    names = [expert.name for expert in mixture.experts]
    if sorted(order) != sorted(names):
        raise AdapterNameError(
            "An order names each expert of the mixture once.",
            received=f"{', '.join(map(repr, order))}, for {', '.join(map(repr, names))}",
            remedy="name them all",
        )
    return _selected(mixture, [names.index(name) for name in order])


def _place(mixture: MixtureCheckpoint, name: str) -> int:
    names = [expert.name for expert in mixture.experts]
    if name not in names:
        raise AdapterNameError(
            "An edit names experts of the mixture.",
            received=f"{name!r}, and experts {', '.join(map(repr, names))}",
            remedy="name one of these",
        )
    return names.index(name)


def _selected(mixture: MixtureCheckpoint, chosen: Sequence[int]) -> MixtureCheckpoint:
    router = {name: each[..., chosen] for name, each in _columns(mixture).items()}
    return _edited(mixture, [mixture.experts[place] for place in chosen], router)


def _edited(
    mixture: MixtureCheckpoint,
    experts: Sequence[Adapter],
    columns: Mapping[str, Tensor],
    added: Adapter | None = None,
) -> MixtureCheckpoint:
    """The mixture with these experts, and with the router's columns of them.

    Args:
        mixture: what it was.
        experts: all experts.
        columns: the tensors that change, experts along the last axis.
        added: the expert that is new.
    """
    layers, before = _layers(experts), _layers(mixture.experts)
    if layers != before:
        gone = {expert.name for expert in mixture.experts} - {expert.name for expert in experts}
        _refuse_other_layers(mixture, {added.name} if added else gone, layers ^ before)
    config = copy.deepcopy(mixture.config)
    places = config.adapters | ({added.name: from_anywhere(added.source or added.name)} if added else {})
    config.adapters = {expert.name: places[expert.name] for expert in experts}
    config.elsewhere = {part: _of_experts(given, config.adapters) for part, given in config.elsewhere.items()}
    if config.top_k_lora is not None:
        config.top_k_lora = min(config.top_k_lora, len(experts))
    config.validate_for(len(experts), config.hidden_size)
    axes = router_class(config).expert_axes(config, mixture.num_layers) if columns else {}
    router = dict(mixture.router)
    for name, each in columns.items():
        flat = router[name].dim() < each.dim()
        parted = each.movedim((0, -1), (axes[name], axes[name] + 1)) if flat else each.movedim(-1, axes[name])
        router[name] = (parted.flatten(axes[name], axes[name] + 1) if flat else parted).contiguous()
    return replace(
        mixture, config=config, router=router, experts=experts, layers=mixture.layers if layers == before else ()
    )


def _of_experts(given: Any, names: Mapping[str, str]) -> Any:
    return given if given == UNIFORM else {name: value for name, value in given.items() if name in names}


def _layers(experts: Sequence[Adapter]) -> set[str]:
    return {path for expert in experts for path in expert.weights}


def _refuse_other_layers(mixture: MixtureCheckpoint, edited: Collection[str], changed: Collection[str]) -> None:
    """Refuse other adapted layers where the router's tensors are numbered by them.

    Args:
        mixture: what it was.
        edited: the experts that come or go.
        changed: the layers that come or go with them.
    """
    config, experts = mixture.config, len(mixture.experts)

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        columns = (tuple(range(experts)),) * layers
        return router_class(config).shapes(config, RouterSizes(config.hidden_size, layers, experts, columns))

    if shapes(1) != shapes(2):
        raise AdapterMismatchError(
            "The experts of a router that numbers the adapted layers adapt the same ones, all together.",
            received=f"expert {', '.join(map(repr, edited))}, with which {len(changed)} layers come or go, such as "
            f"{min(changed)!r}",
            remedy="use an expert with the target_modules of the others, or build a new mixture",
        )


def _check_sizes(others: Sequence[Adapter], expert: Adapter) -> None:
    """Refuse an expert that gives a module another size than those that are there."""
    known = {path: (other, part) for other in others for path, part in other.weights.items()}
    for path, part in expert.weights.items():
        if path not in known:
            continue
        other, there = known[path]
        if _sizes(part) != _sizes(there):
            raise of_another_base(
                expert, f"module {path!r}: sizes {_sizes(part)}, where {other.name!r} has {_sizes(there)}"
            )


def _sizes(part: LoraWeights) -> tuple[int, ...]:
    stored = part.as_file() if isinstance(part, BlockWeights) else part
    return (*stored.A.shape[1:], len(stored.B))


def _columns(mixture: MixtureCheckpoint) -> dict[str, Tensor]:
    """The router's tensors that hold experts, with these along the last axis; layers first where the axis has both."""
    config, experts = mixture.config, len(mixture.experts)
    axes = router_class(config).expert_axes(config, mixture.num_layers)
    columns: dict[str, Tensor] = {}
    for name, axis in axes.items():
        tensor = mixture.router[name]
        if tensor.shape[axis] == experts:
            columns[name] = tensor.movedim(axis, -1)
        else:
            columns[name] = tensor.unflatten(axis, (-1, experts)).movedim((axis, axis + 1), (0, -1))
    return columns


def _cold(mixture: MixtureCheckpoint, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gating = gating_of(mixture.config)
    cold = gating.cold(len(mixture.experts))
    if cold is None:
        raise ConfigurationError(
            "A new expert adds nothing where the gating can give it no weight.",
            received=f"{gating}, in which every expert has one",
            remedy="give the expert's tensors (column=)",
        )
    rest = {name: tensor for name, tensor in mixture.router.items() if name not in columns}
    return router_class(mixture.config).cold_expert(mixture.config, columns, rest, *cold)


def _checked(column: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A column that was given, in the shapes of one expert."""
    expected = {name: tuple(each.shape[:-1]) for name, each in columns.items()}
    found = {name: tuple(each.shape) for name, each in column.items()}
    finite = all(bool(torch.isfinite(each).all()) for each in column.values())
    if found != expected or not finite:
        raise ConfigurationError(
            "A column holds one expert's part of each of the router's tensors, in finite numbers.",
            received=f"shapes {found}{'' if finite else ', with infinite ones or NaN'}",
            remedy=f"give {expected}",
        )
    return dict(column)
