# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""The Triton kernels behind `fused`, and the operators that launch them; importing this module needs triton.

A low-rank activation is made in shares, each the sum over a part of the inputs, so that few tokens still give many
programs. Whoever reads the shares adds them in a fixed order, without atomics: results are the same bit for bit.

R: total rank of the layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # on a CPU; there, a product of bfloat16 multiplies its bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ENOUGH_PROGRAMS = 256  # about two for each multiprocessor of a large GPU
FEW_TOKENS = 128


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def shrink(
    shares,
    x,
    A,
    columns,
    tokens,
    inputs,
    R,
    x_row,
    A_row,
    columns_row,
    share,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """`shares[n] = (x Aᵀ) ∘ columns` over inputs n · share and on: a tile of tokens and ranks.

    Args:
        shares: (splits, tokens, R), float32, contiguous; written.
        x: (tokens, inputs), its rows `x_row` apart.
        A: (R, inputs), its rows `A_row` apart.
        columns: (tokens, R), its rows `columns_row` apart, or (R,) for all tokens with 0; not read without GATED.
        tokens: how many.
        inputs: how many.
        R: how many ranks.
        x_row: stride.
        A_row: stride.
        columns_row: stride.
        share: inputs of one share, a multiple of INPUTS.
        GATED: whether to multiply by the columns.
        TOKENS: of a tile.
        RANKS: of a tile.
        INPUTS: of a step.
    """
    tiles = tl.cdiv(tokens, TOKENS)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    token = (tile % tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    rank = (tile // tiles * RANKS + tl.arange(0, RANKS)).to(tl.int64)[None, :]
    start = part * share
    stop = tl.minimum(start + share, inputs)
    total = tl.zeros((TOKENS, RANKS), tl.float32)
    for first in range(start, stop, INPUTS):
        step = first + tl.arange(0, INPUTS)
        across = step[None, :]
        down = step[:, None]
        left = tl.load(x + token * x_row + across, mask=(token < tokens) & (across < stop), other=0.0)
        right = tl.load(A + rank * A_row + down, mask=(rank < R) & (down < stop), other=0.0)
        if INTERPRETED:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (token < tokens) & (rank < R)
    if GATED:
        total *= tl.load(columns + token * columns_row + rank, mask=inside, other=0.0).to(tl.float32)
    tl.store(shares + (part.to(tl.int64) * tokens + token) * R + rank, total, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def expand(
    y,
    shares,
    B,
    tokens,
    outputs,
    R,
    y_row,
    B_row,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """`y += (Σ shares) Bᵀ`: a tile of tokens and outputs.

    Args:
        y: (tokens, outputs), its rows `y_row` apart; overwritten.
        shares: (SPLITS, tokens, R), float32, contiguous.
        B: (outputs, R), its rows `B_row` apart.
        tokens: how many.
        outputs: how many.
        R: how many ranks.
        y_row: stride.
        B_row: stride.
        SPLITS: how many shares there are.
        TOKENS: of a tile.
        OUTPUTS: of a tile.
        RANKS: of a step.
    """
    tiles = tl.cdiv(tokens, TOKENS)
    tile = tl.program_id(0)
    token = (tile % tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    output = (tile // tiles * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)[None, :]
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, R, RANKS):
        step = first + tl.arange(0, RANKS)
        across = step[None, :]
        down = step[:, None]
        inside = (token < tokens) & (across < R)
        gated = tl.zeros((TOKENS, RANKS), tl.float32)
        for part in tl.static_range(SPLITS):
            gated += tl.load(shares + (part * tokens.to(tl.int64) + token) * R + across, mask=inside, other=0.0)
        right = tl.load(B + output * B_row + down, mask=(output < outputs) & (down < R), other=0.0)
        gated = gated.to(right.dtype)
        if INTERPRETED:
            gated = gated.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(gated, right, total, input_precision="ieee")
    place = y + token * y_row + output
    inside = (token < tokens) & (output < outputs)
    before = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


class Tiling(NamedTuple):
    """How both products are cut into programs.

    Args:
        tokens: of a tile.
        ranks: of a tile of the first product.
        inputs: of a step of the first product.
        outputs: of a tile of the second product.
        depth: ranks of a step of the second product.
        splits: into how many shares the inputs go.
        share: inputs of each share, a multiple of `inputs`.
    """

    tokens: int
    ranks: int
    inputs: int
    outputs: int
    depth: int
    splits: int
    share: int


def tiling(tokens: int, inputs: int, R: int, *, wide: bool) -> Tiling:
    """Tiles for these sizes; smaller ones for `wide`, four-byte elements.

    Few tokens leave few tiles: the inputs are then split until there are programs enough, or two steps in a share.
    """
    few = tokens <= FEW_TOKENS
    tile, ranks, step, outputs, most = (16, 16, 128, 32, 16) if few else (64, 32, 64, 64, 4)
    if wide:
        tile, step = min(tile, 32), step // 2
    tiles = _parts(tokens, tile) * _parts(R, ranks)
    splits = 1
    while 2 * splits * tiles <= ENOUGH_PROGRAMS and 2 * splits <= most and 4 * splits * step <= inputs:
        splits *= 2
    return Tiling(tile, ranks, step, outputs, 64, splits, _parts(_parts(inputs, splits), step) * step)


def _parts(whole: int, size: int) -> int:
    return -(-whole // size)


# Defined by their schemas: what `custom_op` wraps around a call takes more than ten times as long.
torch.library.define("loramix::add_mixture", "(Tensor(a!) y, Tensor x, Tensor A, Tensor columns, Tensor B) -> ()")
torch.library.define("loramix::shrink", "(Tensor x, Tensor A) -> Tensor")
torch.library.define("loramix::expand", "(Tensor(a!) y, Tensor gated, Tensor B) -> ()")


@torch.library.register_fake("loramix::add_mixture")
def _fake_mixture(y: Tensor, x: Tensor, A: Tensor, columns: Tensor, B: Tensor) -> None:
    return None


@torch.library.register_fake("loramix::shrink")
def _fake_shrink(x: Tensor, A: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[0], dtype=torch.float32)


@torch.library.register_fake("loramix::expand")
def _fake_expand(y: Tensor, gated: Tensor, B: Tensor) -> None:
    return None


@torch.library.impl("loramix::add_mixture", "CompositeExplicitAutograd")
def _add_mixture(y: Tensor, x: Tensor, A: Tensor, columns: Tensor, B: Tensor) -> None:
    (tokens, inputs), (outputs, R) = x.shape, B.shape
    per_token = (tokens, R)[2 - columns.dim() :]
    _check("add_mixture", y=(y, (tokens, outputs)), x=(x, (tokens, inputs)), A=(A, (R, inputs)),
           columns=(columns, per_token), B=(B, (outputs, R)))  # fmt: skip
    if 0 not in (tokens, inputs, outputs, R):
        with _on(x):
            _expand(y, _shrink(x, A, columns), B)


@torch.library.impl("loramix::shrink", "CompositeExplicitAutograd")
def _low_rank(x: Tensor, A: Tensor) -> Tensor:
    (tokens, inputs), R = x.shape, A.shape[0]
    _check("shrink", x=(x, (tokens, inputs)), A=(A, (R, inputs)))
    if 0 in (tokens, inputs, R):
        return x.new_zeros(tokens, R, dtype=torch.float32)
    with _on(x):
        shares = _shrink(x, A, None)
        return shares[0] if len(shares) == 1 else shares.sum(0)


@torch.library.impl("loramix::expand", "CompositeExplicitAutograd")
def _add_expanded(y: Tensor, gated: Tensor, B: Tensor) -> None:
    (tokens, R), outputs = gated.shape, B.shape[0]
    _check("expand", y=(y, (tokens, outputs)), B=(B, (outputs, R)))
    if not (gated.dtype == torch.float32 and gated.device == y.device and gated.is_contiguous()):
        raise ValueError(
            "expand takes a low-rank activation of contiguous float32 on the device of y; received "
            f"{gated.dtype}, strides {gated.stride()}, on {gated.device}."
        )
    if 0 not in (tokens, outputs, R):
        with _on(y):
            _expand(y, gated.unsqueeze(0), B)


def _shrink(x: Tensor, A: Tensor, columns: Tensor | None) -> Tensor:
    """(splits, tokens, R), float32: the shares of `(x Aᵀ) ∘ columns`."""
    (tokens, inputs), R = x.shape, A.shape[0]
    t = tiling(tokens, inputs, R, wide=x.element_size() > 2)
    shares = torch.empty(t.splits, tokens, R, dtype=torch.float32, device=x.device)
    per_token = columns.stride(0) if columns is not None and columns.dim() == 2 else 0
    shrink[(_parts(tokens, t.tokens) * _parts(R, t.ranks), t.splits)](
        shares, x, A, x if columns is None else columns, tokens, inputs, R, x.stride(0), A.stride(0), per_token,
        t.share, GATED=columns is not None, TOKENS=t.tokens, RANKS=t.ranks, INPUTS=t.inputs,
    )  # fmt: skip
    return shares


def _expand(y: Tensor, shares: Tensor, B: Tensor) -> None:
    """`y += (Σ shares) Bᵀ`."""
    (splits, tokens, R), outputs = shares.shape, B.shape[0]
    t = tiling(tokens, outputs, R, wide=y.element_size() > 2)  # of it, what the second product needs
    expand[(_parts(tokens, t.tokens) * _parts(outputs, t.outputs),)](
        y, shares, B, tokens, outputs, R, y.stride(0), B.stride(0),
        SPLITS=splits, TOKENS=t.tokens, OUTPUTS=t.outputs, RANKS=t.depth, num_stages=2,
    )  # fmt: skip


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _check(operator: str, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Kernels get bare pointers: tensors that do not fit would be read out of bounds."""
    first = next(iter(tensors.values()))[0]
    fits = first.dtype in DTYPES and all(
        t.dtype == first.dtype
        and t.device == first.device
        and t.shape == size
        and (t.stride(-1) == 1 or t.shape[-1] == 1)
        for t, size in tensors.values()
    )
    if not fits:
        expected = ", ".join(f"{name} {size}" for name, (_, size) in tensors.items())
        received = ", ".join(f"{tuple(t.shape)} {t.dtype} strides {t.stride()}" for t, _ in tensors.values())
        raise ValueError(
            f"{operator} takes {expected} of one device and one of {DTYPES}, the elements of each row side by side; "
            f"received {received}."
        )


add_to = torch.ops.loramix.add_mixture.default
low_rank = torch.ops.loramix.shrink.default
add_expanded = torch.ops.loramix.expand.default
