"""Layers of the base model as experts adapt them: their kind, their sizes, and which are refused.

Only sizes are read, never `weight.shape`, so that quantised layers work.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from transformers.pytorch_utils import Conv1D

from loramix.errors import UnsupportedAdapterError

Kind = Literal["linear", "embedding", "convolution"]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, None if experts cannot adapt it; modules with `in_features`, `out_features` are linear."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _ConvNd):
        return None if module.transposed else "convolution"
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return "linear" if isinstance(module, Conv1D) or all(isinstance(size, int) for size in sizes) else None


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's tensors; the CPU if it has none."""
    return next((tensor.device for tensor in chain(layer.parameters(), layer.buffers())), torch.device("cpu"))


def computes_with_its_weight(layer: nn.Module) -> bool:
    """Whether `layer.weight` is the matrix that the layer multiplies with: no quantised one, and no forward of its own.

    A quantised layer may look plain: compressed-tensors gives an `nn.Linear` another forward, torchao another weight.
    accelerate's forward moves tensors and changes no number.
    """
    plain = type(layer) is nn.Linear or isinstance(layer, Conv1D | nn.Embedding | _ConvNd)
    moved_only = "forward" not in layer.__dict__ or "_hf_hook" in layer.__dict__
    return plain and moved_only and type(getattr(layer, "weight", None)) in (Tensor, nn.Parameter)


def dense_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight (out, in) in float32; a quantised one is found by applying the layer to the identity."""
    if computes_with_its_weight(layer):
        weight: Any = layer.weight
        return weight.detach().float().T if isinstance(layer, Conv1D) else weight.detach().float()
    reference = next(t for t in (*layer.parameters(), *layer.buffers()))
    dtype = reference.dtype if reference.dtype.is_floating_point else torch.float32
    eye = torch.eye(linear_sizes(layer)[0], device=reference.device, dtype=dtype)
    out: Tensor = layer(eye)
    bias = getattr(layer, "bias", None)
    return (out if bias is None else out - bias).T.float()


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """in and out of a linear layer, from its attributes."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features  # pyright: ignore[reportReturnType]


def expected_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B in an expert's file, for this module and rank."""
    if isinstance(module, nn.Embedding):
        return (rank, module.num_embeddings), (module.embedding_dim, rank)
    if isinstance(module, _ConvNd):
        kernel = tuple(module.kernel_size)
        return (rank, module.in_channels, *kernel), (module.out_channels, rank, *[1] * len(kernel))
    inputs, outputs = linear_sizes(module)
    return (rank, inputs), (outputs, rank)


def _looks_up_its_input(embedding: nn.Embedding) -> bool:
    return type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "embed_scale")


_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|[^.]*position[^.]*)$")
_DISPATCHED = re.compile(r"(?:^|\.)experts\.\d+(?:\.|$)")


def why_unadaptable(module: nn.Module, path: str, *, dora: bool = False) -> str | None:
    """Why no adapted layer can stand in for a module; None where one can.

    Args:
        module: the module.
        path: its path.
        dora: whether the expert uses DoRA in it.
    """
    kind = kind_of(module)
    if kind is None:
        return f"a {type(module).__name__}"
    if dora and kind != "linear":
        return f"DoRA on a {type(module).__name__}"
    if isinstance(module, nn.Embedding) and not _looks_up_its_input(module):
        return f"a {type(module).__name__}, which does not look up its input"
    if isinstance(module, nn.Embedding) and _POSITIONS.search(path):
        return "an embedding of positions, which are no tokens of their own"
    if _DISPATCHED.search(path):
        return "an expert block, to which tokens are dispatched in another order"
    if isinstance(module, _ConvNd) and (module.groups != 1 or set(module.dilation) != {1}):
        return f"a convolution with groups={module.groups}, dilation={tuple(module.dilation)}"
    if isinstance(module, _ConvNd) and module.padding_mode != "zeros":
        return f"a convolution with padding_mode={module.padding_mode!r}"
    return None


def refuse_module(module: nn.Module, path: str, expert: str, *, dora: bool) -> None:
    """Refuse a module that no adapted layer can stand in for.

    Args:
        module: the module.
        path: its path, for the message.
        expert: the expert's name, for the message.
        dora: whether the expert uses DoRA in it.

    Raises:
        UnsupportedAdapterError: a module of an unknown kind, DoRA on other than a linear layer, an embedding of
            positions or with a lookup of its own, a block of a mixture-of-experts base model, or a convolution with
            groups, dilation or padding other than zeros.
    """
    reason = why_unadaptable(module, path, dora=dora)
    if reason is not None:
        raise UnsupportedAdapterError(
            "Experts may adapt linear layers, Conv1D, embeddings, and plain convolutions (DoRA: linear layers only).",
            received=f"expert {expert!r} adapts {path!r}: {reason}",
            remedy="train the expert without this module in target_modules",
        )
