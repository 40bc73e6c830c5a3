"""A mixture of constant scalings as one LoRA adapter: side by side, or as near as a given rank comes.

Experts whose scalings are the same for every token add g · Σ_e s[e] · c_e · B_e A_e to a layer, which is one product of
their A below each other and their scaled B beside each other, of rank R; and, by its singular values, the nearest one
of any lower rank (Eckart and Young).

R: total rank of a layer. N: matrices in a parameter of a mixture-of-experts block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from loramix.config.lora import LoraConfig
from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.experts.adapter import Adapter, BlockWeights, LoraWeights
from loramix.experts.blocks import BlockMatrices
from loramix.experts.offload import with_weights
from loramix.layers.dora import DoraStack
from loramix.layers.layer import XLoraLayer
from loramix.layers.routing import Routing
from loramix.layers.stack import ExpertStack

NAME = "mixture"


@torch.no_grad()
def single_adapter(
    layers: Mapping[str, XLoraLayer], routing: Routing, like: LoraConfig, *, rank: int | None = None
) -> tuple[Adapter, float]:
    """The mixture as one expert.

    Args:
        layers: the adapted layers by path.
        routing: constant, or the same for all tokens.
        like: an expert's configuration, for the base model's name and such.
        rank: of each layer at most; None keeps all of it.

    Returns:
        The adapter, and what it leaves out: the Frobenius norm of the difference of all layers' weights, relative to
        that of what the experts add; 0 without a rank.

    Raises:
        ConfigurationError: a rank below 1.
        UnsupportedOperationError: an expert with DoRA or a bias, which a product of two matrices does not hold.
    """
    if rank is not None and rank < 1:
        raise ConfigurationError("A rank is at least 1.", received=f"rank={rank}", remedy="Use rank=16, or None.")
    weights: dict[str, LoraWeights] = {}
    lost = whole = 0.0
    for path, layer in layers.items():
        both = with_weights(layer.stack, _side_by_side, path, layer.stack, routing)
        if rank is not None and both.rank > rank:
            both, left_out, all_of_it = _nearest(both, rank)
            lost, whole = lost + left_out, whole + all_of_it
        else:
            whole += float(_product(both).square().sum())
        weights[path] = both
    largest = max(part.rank for part in weights.values())
    ranks = {path: part.rank for path, part in weights.items() if part.rank != largest}
    named = [path for path in weights if isinstance(layers[path].base_layer, BlockMatrices)]
    config = dataclasses.replace(
        LoraConfig(task_type=like.task_type),
        r=largest,
        lora_alpha=largest,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules={path for path in weights if path not in named},
        target_parameters=named or None,
        fan_in_fan_out=like.fan_in_fan_out,
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
        inference_mode=True,
    )
    return Adapter(NAME, config, weights), (lost / whole) ** 0.5 if whole else 0.0


def _side_by_side(path: str, stack: ExpertStack, routing: Routing) -> LoraWeights:
    if stack.biased or isinstance(stack, DoraStack):
        raise UnsupportedOperationError(
            "One LoRA adapter holds two matrices for each layer.",
            received=f"{path!r}: an expert with {'a bias' if stack.biased else 'DoRA'}",
            remedy="merge into plain weights with merge_and_unload()",
        )
    up = stack.whole("lora_B").float()
    tensors = {"lora_A": stack.whole("lora_A").float(), "lora_B": up * routing.columns(stack, up)}
    parts = list(stack.unstack(tensors).values())
    kept = [part for part in parts if bool(part.B.any())] or parts[:1]
    if isinstance(kept[0], BlockWeights):
        down, up = torch.cat([part.A for part in kept], dim=1), torch.cat([part.B for part in kept], dim=2)
        return BlockWeights(down, up, exchanged=kept[0].exchanged)
    A = torch.cat([part.A for part in kept])
    return LoraWeights(
        A.contiguous(), torch.cat([part.B for part in kept], dim=1).contiguous(), embedding=stack.is_embedding
    )


def _product(weights: LoraWeights) -> Tensor:
    A, B = _as_matrices(weights)
    return B @ A


def _as_matrices(weights: LoraWeights) -> tuple[Tensor, Tensor]:
    """A as (r, in) and B as (out, r); of a mixture-of-experts block (N, r, in) and (N, out, r)."""
    if isinstance(weights, BlockWeights):
        return weights.A, weights.B
    return weights.A.flatten(1), weights.B.flatten(1)


def _nearest(weights: LoraWeights, rank: int) -> tuple[LoraWeights, float, float]:
    """The nearest product of a lower rank, and the squared norms of what is left out and of the whole."""
    A, B = _as_matrices(weights)
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.mT)
    U, S, V = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    rank = min(rank, S.shape[-1])
    root = S[..., :rank].sqrt()
    new_B = left @ U[..., :rank] * root.unsqueeze(-2)
    new_A = (right @ V[..., :rank, :].mT * root.unsqueeze(-2)).mT
    if isinstance(weights, BlockWeights):
        new: LoraWeights = BlockWeights(new_A, new_B, exchanged=weights.exchanged)
    else:
        new = LoraWeights(
            new_A.reshape(rank, *weights.A.shape[1:]).contiguous(),
            new_B.reshape(len(new_B), rank, *weights.B.shape[2:]).contiguous(),
            embedding=weights.embedding,
        )
    return new, float(S[..., rank:].square().sum()), float(S.square().sum())
