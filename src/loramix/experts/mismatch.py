"""Why an expert's modules are not those of a base model: each cause has an error of its own, and a remedy.

The base model may hold a block's experts in one parameter where the file has a module for each, or the other way round;
it may have the modules under other names; or it is another base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher

from torch import nn

from loramix.errors import AdapterMismatchError
from loramix.experts.adapter import Adapter, LoraWeights, of_another_base, renamed
from loramix.experts.base_layers import expected_shapes, kind_of
from loramix.experts.blocks import BlockMatrices

_OF_ONE_EXPERT = re.compile(r"\.experts\.(?:expert_)?\d+(?:\.|$)")
_OF_ALL_EXPERTS = re.compile(r"\.experts(?:\.base_layer)*$")
_MOST = 8  # renamings in one remedy

Renaming = tuple[str, str]
"""What is to be replaced in the file's paths, and by what (`Adapter.renamed`)."""


def absent_modules(adapter: Adapter, modules: Mapping[str, nn.Module]) -> AdapterMismatchError | None:
    """The error for an expert with tensors for modules that the base model does not have; None if it has them all.

    Args:
        adapter: the expert, by the base model's names as far as they are known.
        modules: the base model's modules and the parameters of its blocks, by path.
    """
    absent = [path for path in adapter.weights if path not in modules]
    if not absent:
        return None
    fused = _fused(adapter, modules, absent)
    if fused is not None:
        return fused
    renamings = _renamings(adapter, modules, absent)
    if not renamings:
        return of_another_base(adapter, f"{shown(absent)}: the base model has no such module")
    here = absent[0]
    for renaming in renamings:
        here = renamed(here, *renaming)
    wrappers = [old.removesuffix(".") for old, new in renamings if not new]
    if wrappers:
        rule = "An expert's file names modules without what was around its base model."
        what = f"the base model has no {', '.join(map(repr, wrappers))} there, and has {here!r}"
    else:
        rule = "An expert's file names modules as its base model does."
        what = f"the base model has no such module, and {here!r} of the same sizes"
    calls = "".join(f".renamed({old!r}, {new!r})" for old, new in renamings)
    return AdapterMismatchError(
        rule,
        received=f"expert {adapter.name!r}, {shown(absent)}: {what}",
        remedy="if it is this base model under other names, save the expert under the present ones: from "
        "loramix.formats import load_adapter, save_adapter; save_adapter('renamed', load_adapter("
        f"{adapter.name!r}, {adapter.source!r}){calls}); otherwise {of_another_base(adapter, '').remedy}",
    )


def shown(paths: Sequence[str]) -> str:
    """The first three modules, for a message."""
    return f"module {', '.join(map(repr, paths[:3]))}" + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _fused(adapter: Adapter, modules: Mapping[str, nn.Module], absent: Sequence[str]) -> AdapterMismatchError | None:
    """The error where either the file or the base model has a module for each of a block's experts, and not both."""
    separate = [path for path in absent if _OF_ONE_EXPERT.search(path)]
    together = [path for path in absent if _OF_ALL_EXPERTS.search(path)]
    own_separate = next((path for path in modules if _OF_ONE_EXPERT.search(path)), None)
    own_together = [path for path, module in modules.items() if isinstance(module, BlockMatrices)]
    rule = "An expert's file and its base model hold the experts of a mixture-of-experts block in the same way."
    leave = "leave them out: drop_unsupported=True"
    if separate and own_together and own_separate is None:
        names = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in own_together))
        return AdapterMismatchError(
            rule,
            received=f"expert {adapter.name!r}, {shown(separate)}: one module for each of a block's experts; the base "
            f"model has one parameter for all of them, such as {own_together[0]!r}",
            remedy=f"train the expert anew with target_parameters={names!r}, or {leave}",
        )
    if together and own_separate is not None:
        return AdapterMismatchError(
            rule,
            received=f"expert {adapter.name!r}, {shown(together)}: one parameter for all of a block's experts; the "
            f"base model has a module for each of them, such as {own_separate!r}",
            remedy=f"load the base model in a class that has one parameter for all of them, or {leave}",
        )
    return None


def _renamings(adapter: Adapter, modules: Mapping[str, nn.Module], absent: Sequence[str]) -> list[Renaming]:
    """What leads from the file's paths to modules of the same sizes; empty if some are found nowhere."""
    found: list[Renaming] = []
    weights = dict(adapter.weights)
    left = list(absent)
    while left and len(found) < _MOST:
        renaming = next((each for each in _candidates(left[0], modules) if _holds(each, weights, modules)), None)
        if renaming is None:
            return []
        found.append(renaming)
        weights = {renamed(path, *renaming): each for path, each in weights.items()}
        left = [path for path in weights if path not in modules]
    return [] if left else found


def _holds(renaming: Renaming, weights: Mapping[str, LoraWeights], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a renaming leads every path that it changes to a module of its own that takes its tensors."""
    changed = {path: renamed(path, *renaming) for path in weights}
    if len({*changed.values()}) < len(changed):
        return False
    return all(path == new or _fits(modules.get(new), weights[path]) for path, new in changed.items())


def _fits(module: nn.Module | None, weights: LoraWeights) -> bool:
    if module is None or kind_of(module) is None or isinstance(module, BlockMatrices):
        return False
    shapes = (tuple(weights.A.shape), tuple(weights.B.shape))
    return shapes == expected_shapes(module, weights.rank) and weights.embedding == isinstance(module, nn.Embedding)


def _candidates(path: str, modules: Mapping[str, nn.Module]) -> Iterator[Renaming]:
    """Renamings of a path, the most likely first: a name left out, another beginning, one other name."""
    parts = path.split(".")
    for part in dict.fromkeys(parts[:-1]):
        if ".".join(each for each in parts if each != part) in modules:
            yield f"{part}.", ""
    for start in range(len(parts)):
        tail = ".".join(parts[start:])
        for own in modules:
            if own.endswith(f".{tail}") and _numbers(own) == _numbers(path):
                yield path[: -len(tail)], own[: -len(tail)]
    for place, part in enumerate(parts):
        end = "" if place == len(parts) - 1 else "."
        others = [own.split(".") for own in modules]
        rest = parts[:place], parts[place + 1 :]
        alike = {
            other[place] for other in others if len(other) == len(parts) and (other[:place], other[place + 1 :]) == rest
        }
        for other in sorted(alike, key=lambda name: -SequenceMatcher(None, part, name).ratio()):
            if not (part.isdecimal() or other.isdecimal()):
                yield part + end, other + end


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdecimal()]
