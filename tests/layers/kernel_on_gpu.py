"""A layer with the fused kernels on a GPU beside the same layer without; `test_fused.py` runs this file where it can.

In a process of its own without the shape checker, which does not compile.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from loramix.experts.adapter import LoraWeights
from loramix.layers import fused
from loramix.layers.layer import adapted_layer
from loramix.layers.routing import LayerRouting, TensorRouting
from loramix.layers.slot import routed
from loramix.layers.stack import LayerExpert

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
IN, OUT, E = 1100, 70, 4
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
shapes = pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 150)], ids=str)
routings = pytest.mark.parametrize("routing", ["known before", "made in the layer"])
Call = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _without_gradients() -> object:
    with torch.no_grad():
        yield


def build(shape: tuple[int, int], dtype: torch.dtype, routing: str) -> tuple[Call, Tensor]:
    """A layer under a routing of its tokens, and an input."""
    torch.manual_seed(0)
    weights = [LoraWeights(torch.randn(r, IN) / IN**0.5, torch.randn(OUT, r) / r**0.5) for r in (8, 16, 40)]
    experts = [LayerExpert(e, w, c, 0.0) for e, w, c in zip((0, 1, 3), weights, (0.5, 2.0, 1.5), strict=True)]
    layer = adapted_layer(nn.Linear(IN, OUT), experts, 0).eval().to("cuda", dtype)
    scalings, W = torch.randn(*shape, 1, E, device="cuda"), torch.randn(64, E, device="cuda")

    def call(x: Tensor) -> Tensor:
        if routing == "made in the layer":
            return routed(LayerRouting(lambda _, h: torch.softmax(h.float() @ W, -1), 0.7), layer, x)
        return routed(TensorRouting(scalings, 0.7), layer, x)

    return call, torch.randn(*shape, IN).to("cuda", dtype)


def without_the_kernels(call: Call, x: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "ENABLED", False)
        return call(x)


def close(got: Tensor, wanted: Tensor) -> None:
    assert_close(got, wanted, atol=ROUNDING[got.dtype], rtol=ROUNDING[got.dtype])


@dtypes
def test_small_products_come_out_right(dtype: torch.dtype) -> None:
    assert fused.proven(torch.device("cuda", torch.cuda.current_device()), dtype)


@routings
@shapes
@dtypes
def test_eager(shape: tuple[int, int], dtype: torch.dtype, routing: str) -> None:
    call, x = build(shape, dtype, routing)
    close(call(x), without_the_kernels(call, x))


@routings
@shapes
@dtypes
def test_graph(shape: tuple[int, int], dtype: torch.dtype, routing: str) -> None:
    call, x = build(shape, dtype, routing)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call(x)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        close(out, without_the_kernels(call, x))


@routings
@shapes
@dtypes
def test_compiled(shape: tuple[int, int], dtype: torch.dtype, routing: str) -> None:
    call, x = build(shape, dtype, routing)
    close(torch.compile(call, fullgraph=True)(x), without_the_kernels(call, x))
