"""What a layer's experts add, by Triton kernels on a GPU.

    y += ((x Aᵀ) ∘ columns) Bᵀ             two launches: shrink and gate, expand and add     `add_mixture`
    h = x Aᵀ;  y += (h ∘ columns(h)) Bᵀ    a router that reads h stands between the two      `shrink`, `expand`

The operators are `loramix::add_mixture`, `loramix::shrink` and `loramix::expand`; `functional.lora_mixture` computes
the same anywhere and is what tests compare with. Sums are float32, and float32 products are exact ones (no TF32). How
the work is divided depends on the sizes alone: nothing is tuned, and once the kernels are compiled nothing waits for
the device, so that CUDA graphs can be captured.

Checked so far: the numbers in Triton's interpreter on a CPU, and that Triton compiles every tiling for compute
capability 8.0 and 9.0. Neither the numbers nor the speed have been seen on a GPU. A layer uses the kernels on a device
only after small products came out right there (`proven`).

`LORAMIX_FUSED=0` in the environment when this module is imported turns them off. Triton is imported when they are first
needed; it comes with PyTorch's CUDA builds for Linux.

R: total rank of the layer, the sum of its experts' ranks.
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from loramix.layers.functional import lora_mixture

ENABLED = os.environ.get("LORAMIX_FUSED") != "0" and importlib.util.find_spec("triton") is not None
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FEW_AND_MANY = (3, 150)  # tokens of the products that are tried: both ways in which `tiling` goes
PLAIN = (Tensor, nn.Parameter)


def add_mixture(
    y: Float[Tensor, "*tokens out"],
    x: Float[Tensor, "*tokens in"],
    A: Float[Tensor, "R in"],
    columns: Float[Tensor, "*#tokens R"],
    B: Float[Tensor, "out R"],
) -> Float[Tensor, "*tokens out"]:
    """`y += ((x Aᵀ) ∘ columns) Bᵀ`, into `y` itself, which is returned.

    Args:
        y: overwritten; its tokens are one dimension or can be viewed as one.
        x: the layer's input.
        A: the down projections, stacked.
        columns: g · c_e · s[e] of each rank column, for each token or, as (R,), for all.
        B: the up projections, stacked.

    Raises:
        ValueError: not what the operator takes: other dtypes or sizes, or elements of a row that lie apart.
    """
    from loramix.layers.kernels import add_to

    add_to(_rows(y), x.reshape(-1, x.shape[-1]), A, columns if columns.dim() == 1 else columns.flatten(0, -2), B)
    return y


def shrink(x: Float[Tensor, "*tokens in"], A: Float[Tensor, "R in"]) -> Float[Tensor, "*tokens R"]:
    """`x Aᵀ`, in float32.

    Raises:
        ValueError: as `add_mixture`.
    """
    from loramix.layers.kernels import low_rank

    return low_rank(x.reshape(-1, x.shape[-1]), A).view(*x.shape[:-1], len(A))


def expand(
    y: Float[Tensor, "*tokens out"], gated: Float[Tensor, "*tokens R"], B: Float[Tensor, "out R"]
) -> Float[Tensor, "*tokens out"]:
    """`y += gated Bᵀ`, into `y` itself, which is returned; `gated` is float32.

    Raises:
        ValueError: as `add_mixture`.
    """
    from loramix.layers.kernels import add_expanded

    add_expanded(_rows(y), gated.flatten(0, -2), B)
    return y


def _rows(y: Tensor) -> Tensor:
    return y if y.dim() == 2 else y.view(-1, y.shape[-1])


def usable(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether `add_mixture` may replace the plain products: a proven GPU, one dtype, no gradients, no autocast.

    `y` must be one that may be overwritten; that is for the caller to know.
    """
    return (
        ENABLED
        and x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and x.dtype in TOLERANCES
        and all(type(t) in PLAIN and t.dtype == x.dtype and t.device == x.device for t in (y, x, A, B))
        and x.shape[:-1] == y.shape[:-1]
        and x.stride(-1) == 1
        and y.is_contiguous()
        and proven(x.device, x.dtype)
    )


_proven: dict[tuple[torch.device, torch.dtype], bool] = {}


def proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether small products came out right here; tried once, and never while a CUDA graph is captured."""
    if (device, dtype) not in _proven:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _proven[device, dtype] = _prove(device, dtype)
    return _proven[device, dtype]


# What `torch.compiler.assume_constant_result` sets, without importing the compiler, and triton with it, at every start.
proven._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _prove(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        wrong = [_error(device, dtype, tokens) for tokens in FEW_AND_MANY]
        trouble = "" if all(w <= TOLERANCES[dtype] for w in wrong) else f"small products are wrong by {wrong}"
    except Exception as error:  # whatever a compiler, a driver or a missing library comes up with
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        warnings.warn(
            f"The fused kernels do not work on {device} in {dtype} ({trouble}). The layers compute without them; "
            "LORAMIX_FUSED=0 in the environment does not try them.",
            stacklevel=2,
        )
    return not trouble


@torch.no_grad()
def _error(device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """How far the kernels are from float64 on a small problem, as a share of the largest sum of what is added up."""

    def waves(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(1.0, 1.0 + count, device="cpu").view(shape).sin().to(device, dtype)

    y, x, A, columns, B = waves(tokens, 50), waves(tokens, 1100), waves(70, 1100), waves(tokens, 70), waves(50, 70)
    exact = y.double() + lora_mixture(x.double(), A.double(), B.double(), columns.double())
    terms = y.double().abs() + F.linear(F.linear(x.double(), A.double()).mul_(columns).abs(), B.double().abs())
    results = add_mixture(y.clone(), x, A, columns, B), expand(y, shrink(x, A).mul_(columns), B)
    return float(torch.stack([(result - exact).abs().max() for result in results]).max() / terms.max())
