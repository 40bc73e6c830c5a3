"""Adapted embeddings and heads whose vocabulary is resized: the experts add nothing to new tokens.

V: entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.experts.base_layers import dense_weight, linear_sizes
from loramix.layers.dora import DoraStack
from loramix.layers.inject import replace
from loramix.layers.layer import XLoraLayer


@contextmanager
def resizing(model: PreTrainedModel) -> Generator[None]:
    """Inside, the model has its own embeddings and head, for transformers to resize; then the adapted ones again."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, XLoraLayer) and any(module is end for end in ends)
    }
    for path, layer in layers.items():
        replace(model, path, layer.base_layer)
    resized: Mapping[str, nn.Module] = {}
    try:
        yield
        resized = {path: model.get_submodule(path) for path in layers}
    finally:
        for path, layer in layers.items():
            replace(model, path, layer)
    for path, base_layer in resized.items():
        _resize(layers[path], base_layer)


@torch.no_grad()
def _resize(layer: XLoraLayer, base_layer: nn.Module) -> None:
    stack, layer.base_layer = layer.stack, base_layer
    if stack.is_embedding:
        for name in stack.places("lora_A"):
            own = stack.get_parameter(name)
            setattr(stack, name, _with_rows(own, cast(nn.Embedding, base_layer).num_embeddings))
        return
    before, size = len(stack.lora_B), linear_sizes(base_layer)[1]
    for name in stack.places("lora_B"):
        setattr(stack, name, _with_rows(stack.get_parameter(name), size))
    if isinstance(stack, DoraStack):
        for name in stack.places("lora_magnitude"):
            own = stack.get_parameter(name)
            new = dense_weight(base_layer)[before:].norm(dim=1).to(own).expand(len(own), -1)
            setattr(stack, name, _parameter(torch.cat([own[:, :size], new], 1), own))
        stack.settle(base_layer)


def _with_rows(own: nn.Parameter, rows: int) -> nn.Parameter:
    """The first rows, and zeros for new ones."""
    kept = own[:rows]
    return _parameter(torch.cat([kept, own.new_zeros(rows - len(kept), own.shape[1])]), own)


def _parameter(values: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=like.requires_grad)
