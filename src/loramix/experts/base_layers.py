"""Layers of the base model as experts adapt them: their kind, their sizes, and which are refused.

Only sizes are read, never `weight.shape`, so that quantised layers work.
"""

from __future__ import annotations

import copy
import re
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from transformers.pytorch_utils import Conv1D

from loramix.errors import UnsupportedAdapterError
from loramix.experts.blocks import COMPUTED, BlockMatrices, called_module
from loramix.experts.offload import execution_device, with_weights

Kind = Literal["linear", "embedding", "convolution", "block", "gate"]
"""A linear layer; an embedding; a convolution; a parameter of a mixture-of-experts block (`BlockMatrices`); a gate:
what multiplies by its own weight and goes on with the product, as the choice of a block's experts does."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, None if experts cannot adapt it; modules with `in_features`, `out_features` are linear."""
    if isinstance(module, BlockMatrices):
        return "block"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _ConvNd):
        return None if module.transposed else "convolution"
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if isinstance(module, Conv1D) or all(isinstance(size, int) for size in sizes):
        return "linear"
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.is_floating_point()
    return "gate" if is_matrix else None


def device_of(layer: nn.Module) -> torch.device:
    """The device that a layer, or the first one of a model, computes on; the CPU if it has no tensors."""
    for part in called_module(layer).modules():
        tensor = next(chain(part.parameters(recurse=False), part.buffers(recurse=False)), None)
        if tensor is not None:
            return execution_device(part) or tensor.device
    return torch.device("cpu")


def computes_with_its_weight(layer: nn.Module) -> bool:
    """Whether `layer.weight` is the matrix that the layer multiplies with: no quantised one, and no forward of its own.

    A quantised layer may look plain: compressed-tensors gives an `nn.Linear` another forward, torchao another weight.
    accelerate's forward moves tensors and changes no number.
    """
    plain = type(layer) is nn.Linear or isinstance(layer, Conv1D | nn.Embedding | _ConvNd)
    plain = plain or kind_of(layer) in ("block", "gate")
    moved_only = "forward" not in layer.__dict__ or "_hf_hook" in layer.__dict__
    return plain and moved_only and type(getattr(layer, "weight", None)) in (Tensor, nn.Parameter)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer holds its weight otherwise than in plain numbers, or computes with other ones."""
    tensors = chain(layer.parameters(), layer.buffers())
    packed = any(type(t) not in (Tensor, nn.Parameter) or t.dtype not in COMPUTED for t in tensors)
    return packed or ("forward" in layer.__dict__ and "_hf_hook" not in layer.__dict__)


def unpack(model: nn.Module) -> None:
    """Let compressed-tensors restore a compressed model's weights, as it does before the model's first forward."""
    handle: Any = model.__dict__.get("ct_decompress_hook")
    if handle is not None:
        model._forward_pre_hooks[handle.id](model, ())  # pyright: ignore[reportPrivateUsage]


@torch.no_grad()
def dense_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight (out, in) in float32; a quantised one is found by applying the layer to the identity."""
    if computes_with_its_weight(layer):
        weight: Tensor = with_weights(layer, getattr, layer, "weight")
        return weight.detach().float().T if isinstance(layer, Conv1D) else weight.detach().float()
    if _dequantises_itself(layer):
        packed: Tensor = with_weights(layer, getattr, layer, "weight")
        return packed.detach().dequantize().float()
    return _on_one_hot(layer, linear_sizes(layer)[0], 1.0)


def rounds_its_input(layer: nn.Module) -> bool:
    """Whether a linear layer rounds its input to steps of a fixed size, and so hides its weight.

    Steps that follow from the input leave one-hot vectors as they are.
    """
    if kind_of(layer) != "linear" or computes_with_its_weight(layer) or _dequantises_itself(layer):
        return False
    rows = min(8, linear_sizes(layer)[0])
    weight = _on_one_hot(layer, rows, 1.0)
    bound = 0.01 * float(weight.abs().max())
    return any(float((_on_one_hot(layer, rows, size) - weight).abs().max()) > bound for size in _SIZES)


_SIZES = (0.5, 0.375, 0.078125, 3.0)  # exact in bfloat16; no two are multiples of one step


def _dequantises_itself(layer: nn.Module) -> bool:
    """Whether the layer's weight is a tensor with a `dequantize` of its own, as those of torchao and quanto."""
    kind: Any = type(getattr(layer, "weight", None))
    return issubclass(kind, Tensor) and kind.dequantize is not Tensor.dequantize


@torch.no_grad()
def _on_one_hot(layer: nn.Module, rows: int, size: float) -> Tensor:
    """The first columns of a linear layer's weight, (out, rows) in float32: of one-hot vectors of this size.

    A copy of the layer is applied: some pack their weight for the dtype that comes first.
    """
    hook = layer.__dict__.get("_hf_hook")
    own = with_weights(layer, copy.deepcopy, layer, {id(hook): hook})
    plain = (t.dtype for t in chain(own.parameters(), own.buffers()) if type(t) in (Tensor, nn.Parameter))
    dtype = next((dtype for dtype in plain if dtype in COMPUTED), torch.float32)
    x = size * torch.eye(rows, linear_sizes(layer)[0], device=device_of(layer), dtype=dtype)
    return (own(x) - own(torch.zeros_like(x[:1]))).T.float() / size


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """in and out of a linear layer, from its attributes; of a gate from its weight."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if kind_of(layer) == "gate":
        outputs, inputs = cast(Tensor, layer.weight).shape
        return inputs, outputs
    return layer.in_features, layer.out_features  # pyright: ignore[reportReturnType]


def expected_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of an expert's A and B, for this module and rank."""
    if isinstance(module, BlockMatrices):
        count, inputs, outputs = module.sizes
        return (count, rank, inputs), (count, outputs, rank)
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
_DISPATCHED = re.compile(r"(?:^|\.)experts\.(?:expert_)?\d+(?:\.|$)")


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
            "Experts may adapt linear layers, Conv1D, embeddings, plain convolutions, and the parameters of "
            "mixture-of-experts blocks that transformers' experts interface runs (DoRA: linear layers only).",
            received=f"expert {expert!r} adapts {path!r}: {reason}",
            remedy="train the expert without this module in target_modules",
        )
