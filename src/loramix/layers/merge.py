"""Experts whose scalings are the same for every token, merged into the weights of the layers they adapt.

    W' = W + g · Σ_e s[e] · c_e · B_e A_e

and with DoRA, of magnitude m and norm n (docs/semantics.md §2),

    W' = W + g · Σ_e s[e] · ((m_e/n_e − 1) W + (m_e/n_e) · c_e · B_e A_e)

R: total rank of a layer. N: matrices in a parameter of a mixture-of-experts block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramix.errors import UnsupportedOperationError
from loramix.experts.base_layers import computes_with_its_weight
from loramix.experts.base_model import text_config
from loramix.experts.blocks import BlockMatrices, called_module, with_matrices
from loramix.experts.offload import is_away
from loramix.layers.block import BlockStack
from loramix.layers.layer import XLoraLayer
from loramix.layers.routing import Routing
from loramix.layers.stack import ExpertStack


class MergedWeights(NamedTuple):
    """A base layer's new weight, in its own shape and dtype, and its new bias; None where it has none."""

    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def merge(layers: Mapping[str, XLoraLayer], routing: Routing) -> dict[str, MergedWeights]:
    """The weights with the experts in them, by path; nothing is changed yet.

    Args:
        layers: the adapted layers.
        routing: constant, or the same for all tokens.

    Raises:
        UnsupportedOperationError: a quantised base layer, one without a bias below an expert that has one, or weights
            that do not stay finite.
    """
    return {path: _merged(path, layer, routing) for path, layer in layers.items()}


def put(model: PreTrainedModel, merged: Mapping[str, MergedWeights]) -> None:
    """Give the base layers, once they are back in their places, their merged weights.

    A weight that others share, as a tied head shares the embedding's, stays theirs.
    """
    layers = with_matrices(model)
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, (weight, bias) in merged.items():
        layer: Any = layers[path]
        tied = uses[id(layer.weight)] > 1
        name = layer.name if isinstance(layer, BlockMatrices) else "weight"
        setattr(called_module(layer), name, nn.Parameter(weight, requires_grad=layer.weight.requires_grad))
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        if tied:
            text_config(model.config).tie_word_embeddings = False
            model.config.tie_word_embeddings = False


def _merged(path: str, layer: XLoraLayer, routing: Routing) -> MergedWeights:
    base, stack = layer.base_layer, layer.stack
    if not computes_with_its_weight(base):
        raise _refused(path, f"a {type(base).__name__} that does not compute with a plain weight: a quantised one")
    weight = cast("Tensor", base.weight)
    if is_away(base) or is_away(stack):
        raise _refused(path, "weights that accelerate has offloaded")
    up, stretch = stack.update_matrices(routing, base)
    update = _product(stack, up[..., : stack.rank])
    if stretch is not None:
        update = update + _rows(base, weight.float()) * stretch.unsqueeze(1)
    new = weight.float() + _like_weight(base, update)
    bias = cast("Tensor | None", getattr(base, "bias", None))
    if stack.biased:
        if bias is None:
            raise _refused(path, "an expert's bias, for which the base layer has no place")
        bias = (bias.float() + up[:, stack.rank :].sum(1)).to(bias.dtype)
    if not bool(torch.isfinite(new).all()):
        raise _refused(path, "weights that become infinite, or NaN")
    return MergedWeights(new.to(weight.dtype), bias)


def _product(stack: ExpertStack, up: Float[Tensor, "*N out R"]) -> Float[Tensor, "*N out inputs"]:
    if isinstance(stack, BlockStack):
        return up @ stack.whole("lora_A").float()
    experts = stack.unstack(dict(stack.named_parameters(recurse=False))).values()
    down = torch.cat([weights.A.float().flatten(1) for weights in experts])
    return up @ down


def _rows(base: nn.Module, weight: Tensor) -> Float[Tensor, "out inputs"]:
    """The base layer's weight with a row for each output."""
    return weight.T if isinstance(base, Conv1D | nn.Embedding) else weight.flatten(1)


def _like_weight(base: nn.Module, rows: Float[Tensor, "*N out inputs"]) -> Tensor:
    """The inverse of `_rows`; of a block's parameter, each matrix as it is stored."""
    if isinstance(base, BlockMatrices):
        return rows.mT if base.form.settings.is_transposed else rows
    transposed = isinstance(base, Conv1D | nn.Embedding)
    return rows.T if transposed else rows.reshape(cast("Tensor", base.weight).shape)


def _refused(path: str, reason: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "Experts are merged into plain weights.",
        received=f"{path!r}: {reason}",
        remedy="keep the experts beside the base model",
    )
