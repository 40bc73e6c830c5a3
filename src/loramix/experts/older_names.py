"""Experts of older versions of transformers: modules that have another name now, or are one with others.

transformers reads the files of base models of its older versions by a table of conversions for each model, which is
asked here too. Where an old file has a linear layer for each expert of a mixture-of-experts block, there is one
parameter for all of them now, and often one for two projections: their ranks are put beside each other, which is exact,

    [W_1; W_2] + [B_1 A_1; B_2 A_2] = [W_1; W_2] + [B_1 0; 0 B_2] [A_1; A_2].

N: a block's own experts. r: rank. in, out: sizes of a matrix.

Source: transformers, `conversion_mapping.py`, `core_model_loading.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from loramix.config.lora import LoraConfig
from loramix.errors import IncompleteCheckpointError, UnsupportedAdapterError
from loramix.experts.adapter import WRAPPED, Adapter, BlockWeights, LoraWeights, of_another_base
from loramix.experts.base_layers import kind_of
from loramix.experts.blocks import BlockMatrices
from loramix.experts.targets import is_target

_WRAPPERS = re.compile(rf"(?:{re.escape(WRAPPED)})*$")


class _Place(NamedTuple):
    """Where an old module is now.

    Attributes:
        path: of the module, or of the parameter of a block.
        projection: which of the projections in the parameter it is, from 0.
        projections: how many there are.
        number: which of the block's experts it belongs to; None outside blocks.
    """

    path: str
    projection: int = 0
    projections: int = 1
    number: int | None = None


def with_present_names(model: PreTrainedModel, modules: Mapping[str, nn.Module], adapter: Adapter) -> Adapter:
    """The expert with the names that the base model has now, where its file has older ones.

    Args:
        model: the base model.
        modules: its modules and the parameters of its blocks, by path.
        adapter: the expert as its file names it.

    Raises:
        UnsupportedAdapterError: DoRA, biases, or several ranks in the experts of a block.
        IncompleteCheckpointError: tensors for some of a block's own experts only.
        AdapterMismatchError: other shapes than the base model's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    old = [path for path in adapter.weights if _WRAPPERS.sub("", path) not in modules]
    old_base = [name for name in adapter.base_weights if name not in parameters]
    if not old and not old_base:
        return adapter
    table = _Table(model)
    places = {path: place for path in old if (place := table.place(path, modules)) is not None}
    base_names = {name: new for name in old_base if (new := table.renamed(name)) in parameters}
    weights: dict[str, LoraWeights] = {}
    for path, given in adapter.weights.items():
        place = places.get(path)
        if place is None or place.number is None:
            weights[path if place is None else place.path] = given
    fused: dict[str, dict[tuple[int, int], str]] = {}
    for path, place in places.items():
        if place.number is not None:
            fused.setdefault(place.path, {})[place.projection, place.number] = path
    scales = {path: adapter.scaling(path) for path in adapter.weights if path in modules}
    for path, place in places.items():
        scales.setdefault(place.path, adapter.scaling(path))
    for path, parts in fused.items():
        matrices, (first, *_) = modules[path], parts.values()
        assert isinstance(matrices, BlockMatrices)
        weights[path] = _fused(adapter, path, matrices, parts, places[first].projections)
    base_weights = {base_names.get(name, name): tensor for name, tensor in adapter.base_weights.items()}
    found = replace(adapter, weights=weights, base_weights=base_weights)
    return replace(found, config=_config(found, modules, scales))


class _Table:
    """transformers' conversions for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms: list[Any] = get_model_conversion_mapping(model, add_legacy=False)
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._renamings = [each for each in transforms if not isinstance(each, WeightConverter)]

    def renamed(self, name: str) -> str:
        """The present name of a parameter that is still one of its own."""
        return rename_source_key(name, self._renamings, [])[0]

    def place(self, path: str, modules: Mapping[str, nn.Module]) -> _Place | None:
        """Where an old module is now; None if it is nowhere, or was converted in a way not known here."""
        stem = _WRAPPERS.sub("", path)
        name = self.renamed(f"{stem}.weight")
        new, pattern = rename_source_key(name, [], self._converters)
        if pattern is None:
            new = new.removesuffix(".weight")
            return _Place(new + path.removeprefix(stem)) if new in modules and new != stem else None
        converter = next(each for each in self._converters if pattern in each.source_patterns)
        number = re.search(pattern.replace("*.", r"(\d+)\."), name)
        dims = [(type(each), each.dim) for each in converter.operations if isinstance(each, _KNOWN)]
        known = len(dims) == len(converter.operations) and dims in ([_MERGED], [_MERGED, (Concatenate, 1)])
        if not known or number is None or not isinstance(modules.get(new), BlockMatrices):
            return None
        patterns = converter.source_patterns
        return _Place(new, patterns.index(pattern), len(patterns), int(number[1]))


_KNOWN = (MergeModulelist, Concatenate)
_MERGED = (MergeModulelist, 0)


def _fused(
    adapter: Adapter, path: str, matrices: BlockMatrices, parts: Mapping[tuple[int, int], str], projections: int
) -> BlockWeights:
    """The experts of a block as one; `parts` are their old paths by projection and number."""
    count, inputs, outputs = matrices.sizes
    out = outputs // projections
    given = {key: adapter.weights[old] for key, old in parts.items()}
    there = sorted({projection for projection, _ in given})
    missing = [(p, n) for p in there for n in range(count) if (p, n) not in given]
    if missing:
        old = next(iter(parts.values()))
        raise IncompleteCheckpointError(
            "An expert adapts a projection in all experts of a mixture-of-experts block, or in none.",
            received=f"expert {adapter.name!r}, block {path.rpartition('.')[0]!r} of {count} experts: tensors for "
            f"{len(given)} projections such as {old!r}, none for {len(missing)} more",
            remedy="save or download the adapter again",
        )
    ranks = {projection: given[projection, 0].rank for projection in there}
    for (projection, number), each in given.items():
        expected = (ranks[projection], inputs), (out, ranks[projection])
        found = tuple(each.A.shape), tuple(each.B.shape)
        if number >= count or (found[0][1:], found[1][:1]) != (expected[0][1:], expected[1][:1]):
            raise of_another_base(adapter, f"module {parts[projection, number]!r}: expected {expected}, found {found}")
        if each.bias is not None or each.magnitude is not None or found != expected:
            reason = "several ranks" if found != expected else "a LoRA bias or DoRA"
            raise UnsupportedAdapterError(
                "The experts of a mixture-of-experts block are adapted by plain LoRA of one rank.",
                received=f"expert {adapter.name!r}: {parts[projection, number]!r} with {reason}",
                remedy="train the expert without these modules in target_modules",
            )
    scale = adapter.scaling(next(iter(parts.values())))
    A = torch.cat([torch.stack([given[p, n].A for n in range(count)]) for p in there], dim=1)
    B = A.new_zeros(count, outputs, A.shape[1])
    start = 0
    for p in there:
        for n in range(count):
            B[n, p * out : (p + 1) * out, start : start + ranks[p]] = given[p, n].B * (
                adapter.scaling(parts[p, n]) / scale
            )
        start += ranks[p]
    return BlockWeights(A, B, exchanged=matrices.exchanged)


def _config(adapter: Adapter, modules: Mapping[str, nn.Module], scales: Mapping[str, float]) -> LoraConfig:
    """The configuration of an expert under its new names.

    Args:
        adapter: the expert.
        modules: the base model's.
        scales: c of the new names.
    """
    config = adapter.config
    kinds = {path: kind_of(modules[path]) for path in adapter.weights if path in modules}
    named = [path if kind == "block" else f"{path}.weight" for path, kind in kinds.items() if kind in _PARAMETERS]
    others = _short([name for name in named if not config.targets_parameter(name)], modules)
    changed = replace(config, target_parameters=[*(config.target_parameters or ()), *others] or None)
    known = replace(adapter, config=changed)
    ranks, alphas = dict[str, int](), dict[str, float]()
    for path in kinds:
        rank, key = adapter.weights[path].rank, re.escape(known.pattern_key(path))
        if rank != known.rank(path):
            ranks[key] = rank
        alpha = scales[path] * (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(alpha, known.alpha(path)):
            alphas[key] = alpha
    changed = replace(changed, rank_pattern=ranks | config.rank_pattern, alpha_pattern=alphas | config.alpha_pattern)
    plain = [path for path, kind in kinds.items() if kind not in _PARAMETERS]
    if isinstance(config.target_modules, set):
        kept = {name for name in config.target_modules if any(f".{path}".endswith(f".{name}") for path in plain)}
        changed = replace(changed, target_modules=kept)
    if all(is_target(changed, path) for path in plain):
        return changed
    return replace(changed, target_modules=set(plain), layers_to_transform=None, layers_pattern=None)


_PARAMETERS = frozenset({"block", "gate"})


def _short(names: Collection[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of parameters by their last two parts, where these match no others."""
    every = [*(path for path in modules if kind_of(modules[path]) == "block"), *(f"{path}.weight" for path in modules)]
    ends = {name: ".".join(name.split(".")[-2:]) for name in names}
    alone = {end for end in ends.values() if {name for name in every if name.endswith(f".{end}")} <= set(names)}
    return list(dict.fromkeys(end if end in alone else name for name, end in ends.items()))
