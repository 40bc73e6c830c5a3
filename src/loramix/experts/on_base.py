"""An expert's tensors by the names of the base model that it is put on, whatever names its file has.

Files name modules. A parameter of a mixture-of-experts block goes by its block's name, and where several parameters of
a block are adapted PEFT wraps the block once for each, the first one innermost: `experts.base_layer`, then `experts`.
Experts of older versions of transformers name modules as these did (`older_names.py`). A base model may have compiled
or otherwise wrapped modules inside itself, which files do not show.

N: matrices in a parameter of a block. r: rank.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramix.config.folder import CONFIG_NAME
from loramix.config.wrappers import unwrapped
from loramix.errors import AdapterMismatchError, CorruptCheckpointError, UnsupportedAdapterError
from loramix.experts.adapter import WRAPPED, Adapter, BlockWeights, LoraWeights, of_another_base
from loramix.experts.base_layers import kind_of, refuse_module
from loramix.experts.base_weights import settle_base_weights
from loramix.experts.blocks import BlockMatrices, with_matrices
from loramix.experts.older_names import with_present_names


def on_base(model: PreTrainedModel, adapter: Adapter) -> Adapter:
    """The expert with its tensors by the base model's own names; names that it has under no version stay.

    Args:
        model: the base model.
        adapter: the expert as its file names it, or as this function does.

    Raises:
        UnsupportedAdapterError: a block or a parameter that no adapted layer can stand in for.
        AdapterMismatchError: other parameters of a block than the configuration names, or other shapes.
        CorruptCheckpointError: another rank than the configuration says.
        IncompleteCheckpointError: tensors for some of a block's own experts only, or fewer rows than trained tokens.
    """
    modules = with_matrices(model)
    adapter = with_present_names(model, modules, _with_wrappers(model, modules, adapter))
    adapter = settle_base_weights(model, adapter)
    weights: dict[str, LoraWeights] = {}
    wrapped: dict[str, dict[int, LoraWeights]] = {}  # block -> how deep inside its wrappers -> tensors
    for path, given in adapter.weights.items():
        block = path
        while block.endswith(WRAPPED) and block not in modules:
            block = block.removesuffix(WRAPPED)
        if block in modules and (block != path or _has_matrices(modules, block)):
            wrapped.setdefault(block, {})[(len(path) - len(block)) // len(WRAPPED)] = given
        else:
            weights[path] = _of_module(adapter, modules.get(path), path, given)
    for block, layers in wrapped.items():
        weights |= _of_block(adapter, modules, block, layers)
    return replace(adapter, weights=weights) if wrapped else adapter


def _with_wrappers(model: PreTrainedModel, modules: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """The expert by the names of a base model that has wrappers inside itself; files name modules without them."""
    here = _by_unwrapped(modules)
    weights = {_named(path, modules, here): each for path, each in adapter.weights.items()}
    base_weights = adapter.base_weights
    if base_weights:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        there = _by_unwrapped(parameters)
        base_weights = {_named(name, parameters, there): each for name, each in base_weights.items()}
    return replace(adapter, weights=weights, base_weights=base_weights)


def _by_unwrapped(names: Iterable[str]) -> Mapping[str, str]:
    """What modules or parameters are called without wrappers -> their names; of several the innermost."""
    return {unwrapped(name): name for name in names if unwrapped(name) != name}


def _named(name: str, own: Container[str], here: Mapping[str, str]) -> str:
    stem = name
    while stem.endswith(WRAPPED) and stem not in here:
        stem = stem.removesuffix(WRAPPED)
    return here[stem] + name.removeprefix(stem) if name not in own and stem in here else name


def _of_module(adapter: Adapter, module: nn.Module | None, path: str, given: LoraWeights) -> LoraWeights:
    if module is None or isinstance(given, BlockWeights):
        return given
    by_weight = adapter.config.targets_parameter(f"{path}.weight")
    if by_weight and (isinstance(module, Conv1D) or kind_of(module) not in ("linear", "gate")):
        raise UnsupportedAdapterError(
            "target_parameters names parameters of mixture-of-experts blocks, and weights stored as (out, in).",
            received=f"expert {adapter.name!r} adapts {path!r}, a {type(module).__name__}, by its weight",
            remedy=f"train the expert with {path.rpartition('.')[2]!r} in target_modules instead",
        )
    if kind_of(module) is not None and given.rank != adapter.rank(path):
        raise CorruptCheckpointError(
            "An expert's matrices are A (r, in) and B (out, r), with r from its configuration.",
            received=f"expert {adapter.name!r}: module {path!r} expected r={adapter.rank(path)}, found {given.rank}",
            remedy="Correct r or rank_pattern in adapter_config.json, or save the adapter again.",
        )
    return given


def _has_matrices(modules: Mapping[str, nn.Module], block: str) -> bool:
    names = (name for name, _ in modules[block].named_parameters(recurse=False))
    return any(isinstance(modules.get(f"{block}.{name}"), BlockMatrices) for name in names)


def _of_block(
    adapter: Adapter, modules: Mapping[str, nn.Module], block: str, wrappers: Mapping[int, LoraWeights]
) -> dict[str, LoraWeights]:
    """The tensors of one block by parameter."""
    module, config = modules[block], adapter.config
    names = [f"{block}.{name}" for name, _ in module.named_parameters(recurse=False)]
    named = [name for name in names if config.targets_parameter(name)]
    others = [name for name in named if name not in modules]
    if others or not _has_matrices(modules, block):
        refuse_module(module, others[0] if others else block, adapter.name, dora=False)
        raise UnsupportedAdapterError(
            "Of a mixture-of-experts block, experts adapt the up and down projections.",
            received=f"expert {adapter.name!r} adapts {(others or [block])[0]!r} of a {type(module).__name__}",
            remedy="train the expert without this parameter in target_parameters",
        )
    if sorted(wrappers) != list(range(len(named))):
        raise AdapterMismatchError(
            "An expert's file holds tensors for each parameter that target_parameters names.",
            received=f"expert {adapter.name!r}, block {block!r}: tensors for {len(wrappers)} parameters, "
            f"target_parameters={config.target_parameters!r} names {', '.join(map(repr, named)) or 'none'} there",
            remedy=f"let target_parameters in {CONFIG_NAME} name the parameters that the expert was trained on, or "
            + of_another_base(adapter, "").remedy,
        )
    return {path: _matrices(adapter, modules, path, wrappers[len(named) - 1 - i]) for i, path in enumerate(named)}


def _matrices(adapter: Adapter, modules: Mapping[str, nn.Module], path: str, given: LoraWeights) -> BlockWeights:
    matrices = modules[path]
    assert isinstance(matrices, BlockMatrices)
    count, inputs, outputs = matrices.sizes
    if matrices.exchanged:
        inputs, outputs = outputs, inputs
    ranks = adapter.rank(path) * count
    expected, found = ((ranks, inputs), (outputs, ranks)), (tuple(given.A.shape), tuple(given.B.shape))
    if expected != found or given.bias is not None or given.magnitude is not None:
        raise AdapterMismatchError(
            "An expert's matrices fit the base model's parameter: A (r · N, in) and B (out, r · N).",
            received=f"expert {adapter.name!r}, parameter {path!r}: expected {expected}, found {found}",
            remedy=of_another_base(adapter, "").remedy,
        )
    return BlockWeights.from_file(given.A, given.B, count, exchanged=matrices.exchanged)
