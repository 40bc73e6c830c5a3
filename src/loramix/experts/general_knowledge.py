"""GenKnowSub: what experts know in general is subtracted from each, which leaves what sets it apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loramix.errors import AdapterMismatchError, UnsupportedAdapterError
from loramix.experts.adapter import Adapter, LoraWeights


def without_general_knowledge(expert: Adapter, general: Sequence[Adapter]) -> Adapter:
    """A − mean of A_g and B − mean of B_g, over the general experts g.

    As in PEFT, the matrices are subtracted, not their products, and each expert keeps its alpha.

    Args:
        expert: the expert.
        general: experts of general text, at least one, of the same modules and ranks.

    Raises:
        AdapterMismatchError: other modules, or other ranks.
        UnsupportedAdapterError: DoRA, or LoRA biases.

    Source: Bohdal et al., GenKnowSub, arXiv 2505.10939; PEFT 0.21.2, `tuners/lora/arrow.py`, `gen_know_sub`.
    """
    own = {path: _shapes(weights) for path, weights in expert.weights.items()}
    for other in general:
        found = {path: _shapes(weights) for path, weights in other.weights.items()}
        if found != own:
            path = next(path for path in [*own, *found] if own.get(path) != found.get(path))
            raise AdapterMismatchError(
                "General knowledge is subtracted from experts of the same modules and ranks.",
                received=f"module {path!r}: {own.get(path, 'none')} in {expert.name!r}, {found.get(path, 'none')} in "
                f"{other.name!r}",
                remedy="train the general experts with the r and target_modules of the others",
            )
    for each in (expert, *general):
        if any(weights.bias is not None or weights.magnitude is not None for weights in each.weights.values()):
            raise UnsupportedAdapterError(
                "General knowledge is subtracted from the two matrices of each module.",
                received=f"expert {each.name!r} with DoRA or LoRA biases",
                remedy="use experts without use_dora and lora_bias",
            )
    return replace(expert, weights={path: _less(path, weights, general) for path, weights in expert.weights.items()})


def _shapes(weights: LoraWeights) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(weights.A.shape), tuple(weights.B.shape)


def _less(path: str, weights: LoraWeights, general: Sequence[Adapter]) -> LoraWeights:
    down = torch.stack([other.weights[path].A.float() for other in general]).mean(0)
    up = torch.stack([other.weights[path].B.float() for other in general]).mean(0)
    A, B = weights.A.float() - down, weights.B.float() - up
    return replace(weights, A=A.to(weights.A.dtype), B=B.to(weights.B.dtype))
