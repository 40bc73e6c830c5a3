"""Weights of the base model that are a mixture's own: put in, taken out, and saved.

They are rows that came with an expert (`experts/base_weights.py`), and modules that were trained beside the experts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.experts.adapter import Adapter
from loramix.experts.base_weights import OwnRows, embedding_paths, is_declared
from loramix.layers.layer import STACK
from loramix.passes.state import AdaptedState, MixtureState, ReplacedRows

SHARED = "_loramix_shared"
"""An attribute of a base model whose weights others use as well."""


@torch.no_grad()
def put_rows(model: nn.Module, state: AdaptedState, own: Sequence[OwnRows]) -> None:
    """Write the rows into the base model, before its layers are replaced; the state keeps what they were.

    Where others use the base model's weights, it gets its own of these.
    """
    for name, rows, values in own:
        weight = model.get_parameter(name)
        if SHARED in vars(model):
            weight = _own_copy(model, weight)
        state.replaced[name] = ReplacedRows(rows, weight.detach()[rows])
        weight.data[rows] = values.to(weight)


def _own_copy(model: nn.Module, weight: nn.Parameter) -> nn.Parameter:
    """A copy of a weight, in its place, and wherever it is tied."""
    own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is weight:
                setattr(module, name, own)
    return own


def replaced_parameters(model: nn.Module, state: AdaptedState) -> list[nn.Parameter]:
    """The parameters with rows that were written into the base model."""
    return [model.get_parameter(_name_here(name, state)) for name in state.replaced]


@torch.no_grad()
def present_rows(model: nn.Module, state: AdaptedState) -> list[OwnRows]:
    """The rows that were written into the base model, as they are now."""
    rows = {name: replaced.rows for name, replaced in state.replaced.items()}
    return [OwnRows(n, r, model.get_parameter(_name_here(n, state)).detach()[r].clone()) for n, r in rows.items()]


@torch.no_grad()
def restore_rows(model: nn.Module, state: AdaptedState) -> None:
    """Restore the rows, once the base model's layers are in their places."""
    for name, (rows, values) in state.replaced.items():
        weight = model.get_parameter(name)
        there = (rows < len(weight)).to(weight.device)  # the vocabulary may have shrunk
        rows = rows.to(weight.device)[there]
        weight.data[rows] = values.to(weight.device)[there]


def own_weights(model: nn.Module, state: AdaptedState, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole weights that are the mixture's own, by the base model's names.

    Args:
        model: the mixture.
        state: its state.
        tensors: by the mixture's names.
    """
    names = dict.fromkeys([*state.replaced, *_trained(model, state)])
    return {name: tensors[_name_here(name, state)] for name in names}


def saved_weights(state: AdaptedState, expert: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base model's weights that an expert's file held, as they are now."""
    return {name: tensors[_name_here(name, state)] for name in state.saved_weights[expert]}


def with_base_weights(
    expert: Adapter, model: PreTrainedModel, state: AdaptedState, tensors: Mapping[str, Tensor]
) -> Adapter:
    """An expert that is saved alone, with all weights of the base model that are its own or its model's.

    `modules_to_save` names their modules, whole, and of a head the whole head, as PEFT wants them; embeddings need no
    name.
    """
    names = dict.fromkeys([*own_weights(model, state, tensors), *itertools.chain(*state.saved_weights.values())])
    biases = [name for name in names if name.endswith("bias") and not is_declared(expert, name.rpartition(".")[0])]
    paths = {name.rpartition(".")[0] for name in names if name not in biases} - embedding_paths(model)
    in_backbone = f"{model.base_model_prefix}." if model.base_model is not model else ""
    paths = {path if path.startswith(in_backbone) else path.partition(".")[0] for path in paths}
    here = (_base_name(name, state) for name, _ in model.named_parameters(remove_duplicate=False))
    whole = [name for name in here if any(name.startswith(f"{path}.") for path in paths)]
    unnamed = sorted(path for path in paths if not is_declared(expert, path))
    declared = [*(expert.config.modules_to_save or []), *unnamed]
    config = dataclasses.replace(expert.config, modules_to_save=declared) if unnamed else expert.config
    config = dataclasses.replace(config, bias="all") if biases else config
    weights = {name: tensors[_name_here(name, state)] for name in [*names, *whole]}
    return dataclasses.replace(expert, config=config, base_weights=weights)


def _trained(model: nn.Module, state: AdaptedState) -> list[str]:
    """The base model's names of all parameters of the modules in which one requires gradients."""
    router = f"{state.router.attribute}." if isinstance(state, MixtureState) else None
    stacks = tuple(f"{path}.{STACK}." for path in state.paths)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(stacks) and not (router and name.startswith(router))
    }
    modules = {name.rpartition(".")[0] for name, parameter in parameters.items() if parameter.requires_grad}
    return [_base_name(name, state) for name in parameters if name.rpartition(".")[0] in modules]


def _name_here(name: str, state: AdaptedState) -> str:
    """The mixture's name of a parameter of the base model."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.base_layer.{leaf}" if path in state.paths or path in state.blocks else name


def _base_name(name: str, state: AdaptedState) -> str:
    path, _, leaf = name.rpartition(".")
    inner = path.removesuffix(".base_layer")
    return f"{inner}.{leaf}" if inner in state.paths or inner in state.blocks else name
