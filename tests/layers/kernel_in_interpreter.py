"""The fused kernels in Triton's interpreter, on a CPU; `test_fused.py` runs this file in a process of its own.

Triton decides when it is imported whether it interprets, and the shape checker is off: it does not compile.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

from loramix.experts.adapter import LoraWeights
from loramix.layers.functional import lora_mixture
from loramix.layers.fused import TOLERANCES, add_mixture, expand, proven, shrink
from loramix.layers.kernels import add_expanded, add_to, low_rank, tiling
from loramix.layers.layer import adapted_layer
from loramix.layers.linear import LinearStack
from loramix.layers.routing import LayerRouting, Routing, TensorRouting
from loramix.layers.slot import routed
from loramix.layers.stack import LayerExpert

ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = {  # tokens, inputs, R, outputs
    "ones": (1, 1, 1, 1),
    "one token": (1, 300, 40, 50),
    "one token, split": (1, 1100, 70, 50),
    "few tokens, odd sizes": (17, 33, 25, 67),
    "many tokens": (130, 65, 70, 70),
    "many tokens, split": (130, 530, 33, 20),
}
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def problem(size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *, shared: bool = False) -> Problem:
    """y, x, A, columns and B whose products are of size one."""
    tokens, inputs, R, outputs = size
    columns = torch.randn(R) if shared else torch.randn(tokens, R)
    A, B = torch.randn(R, inputs) / inputs**0.5, torch.randn(outputs, R) / R**0.5
    y, x = torch.randn(tokens, outputs), torch.randn(tokens, inputs)
    return y.to(dtype), x.to(dtype), A.to(dtype), columns.to(dtype), B.to(dtype)


def expected(y: Tensor, x: Tensor, A: Tensor, columns: Tensor, B: Tensor) -> Tensor:
    """From the reference, in float64."""
    with torch.no_grad():
        return y.double() + lora_mixture(x.double(), A.double(), B.double(), columns.double())


def close(got: Tensor, wanted: Tensor) -> None:
    assert_close(got.double(), wanted, atol=ROUNDING[got.dtype], rtol=ROUNDING[got.dtype])


@pytest.fixture(autouse=True)
def _without_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shared", [False, True], ids=["columns of each token", "columns of all"])
@dtypes
@sizes
def test_the_kernels_equal_the_reference(size: tuple[int, int, int, int], dtype: torch.dtype, shared: bool) -> None:
    y, x, A, columns, B = problem(size, dtype, shared=shared)
    wanted = expected(y, x, A, columns, B)
    assert add_mixture(y, x, A, columns, B) is y
    close(y, wanted)


@dtypes
@sizes
def test_a_gate_between_the_kernels_equals_the_reference(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    y, x, A, columns, B = problem(size, dtype)
    expected_y = expected(y, x, A, columns, B)
    h = shrink(x, A)
    assert_close(h.double(), x.double() @ A.double().T, atol=1e-5, rtol=1e-5)
    assert expand(y, h * columns, B) is y
    close(y, expected_y)


def test_these_sizes_are_split_and_whole() -> None:
    for name, (tokens, inputs, R, _) in SIZES.items():
        for wide in (True, False):
            assert (tiling(tokens, inputs, R, wide=wide).splits > 1) == ("split" in name or (wide and inputs == 300))


@dtypes
@pytest.mark.parametrize("name", ["one token, split", "few tokens, odd sizes"])
def test_without_weight_y_stays_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    y, x, A, columns, B = problem(SIZES[name], dtype)
    before = y.clone()
    assert torch.equal(add_mixture(y, x, A, columns.zero_(), B), before)


@sizes
def test_a_result_repeats_bit_for_bit(size: tuple[int, int, int, int]) -> None:
    y, x, A, columns, B = problem(size)
    assert torch.equal(add_mixture(y.clone(), x, A, columns, B), add_mixture(y, x, A, columns, B))


@sizes
def test_the_order_of_the_experts_does_not_matter(size: tuple[int, int, int, int]) -> None:
    y, x, A, columns, B = problem(size)
    order = torch.randperm(len(A))
    other = add_mixture(y.clone(), x, A[order], columns[:, order], B[:, order].contiguous())
    assert_close(add_mixture(y, x, A, columns, B), other, atol=1e-5, rtol=1e-5)


def test_tokens_are_independent() -> None:
    y, x, A, columns, B = problem((5, 1100, 70, 50))
    alone = [add_mixture(y[i : i + 1].clone(), x[i : i + 1], A, columns[i : i + 1], B) for i in range(5)]
    assert_close(add_mixture(y, x, A, columns, B), torch.cat(alone), atol=1e-5, rtol=1e-5)


@sizes
def test_rows_may_lie_apart(size: tuple[int, int, int, int]) -> None:
    whole = problem(size)
    wide = [F.pad(t, (3, 2), value=7.0) for t in whole]
    y, x, A, columns, B = (t[:, 3:-2] for t in wide)
    add_mixture(y, x, A, columns, B)
    close(y, expected(*whole))
    assert bool((wide[0][:, :3] == 7.0).all() and (wide[0][:, -2:] == 7.0).all())


def test_tokens_of_several_dimensions_are_those_of_one() -> None:
    y, x, A, columns, B = problem((6, 20, 9, 11))
    wanted = expected(y, x, A, columns, B).view(2, 3, 11)
    layers = torch.stack([columns, columns], dim=1).view(2, 3, 2, 9)
    close(add_mixture(y.view(2, 3, 11), x.view(2, 3, 20), A, layers.unbind(-2)[1], B), wanted)


def test_no_tokens_are_nothing_to_do() -> None:
    y, x, A, columns, B = problem((0, 4, 3, 5))
    assert add_mixture(y, x, A, columns, B).shape == (0, 5)
    assert shrink(x, A).shape == (0, 3)
    assert expand(y, shrink(x, A), B).shape == (0, 5)


@pytest.mark.parametrize("which", range(5), ids=["y", "x", "A", "columns", "B"])
def test_what_does_not_fit_is_refused(which: int) -> None:
    fits = problem((4, 6, 3, 5))
    lying = [t.t().contiguous().t() for t in fits]
    longer = [F.pad(t, (0, 0, 0, 1)) for t in fits]
    for bad in (fits[which].double(), lying[which], longer[which], fits[which][:, 1:]):
        with pytest.raises(ValueError, match="add_mixture takes y"):
            add_to(*fits[:which], bad, *fits[which + 1 :])


@pytest.mark.parametrize("bad", ["double", "lying", "wider"])
def test_what_does_not_fit_half_of_the_work_is_refused(bad: str) -> None:
    y, x, A, _, B = problem((4, 6, 3, 5))
    change: Callable[[Tensor], Tensor] = {
        "double": lambda t: t.double(),
        "lying": lambda t: t.t().contiguous().t(),
        "wider": lambda t: F.pad(t, (0, 1)),
    }[bad]
    with pytest.raises(ValueError, match="shrink takes x"):
        low_rank(change(x), A)
    for tensors in ((change(y), x @ A.T, B), (y, x @ A.T, change(B)), (y, change(x @ A.T), B)):
        with pytest.raises(ValueError, match="expand takes"):
            add_expanded(*tensors)


def test_the_operators_are_what_their_schemas_say() -> None:
    y, x, A, columns, B = problem((4, 6, 3, 5))
    torch.library.opcheck(add_to, (y, x, A, columns, B))
    torch.library.opcheck(low_rank, (x, A))
    torch.library.opcheck(add_expanded, (y, columns, B))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_holds_the_operator(backend: str) -> None:
    y, x, A, columns, B = problem((4, 6, 3, 5))
    wanted = expected(y, x, A, columns, B)

    def add(y: Tensor, x: Tensor) -> Tensor:
        assert proven(x.device, x.dtype)
        return add_mixture(y * 1.0, x, A, columns, B)

    close(torch.compile(add, fullgraph=True, backend=backend)(y, x), wanted)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_small_products_come_out_right(dtype: torch.dtype) -> None:
    assert proven(torch.device("cpu"), dtype)


@pytest.mark.parametrize("in_layer", [False, True], ids=["known before", "made in the layer"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_computes_the_same_with_the_kernels(
    compiled: bool, in_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, scales = (2, 3, 1), (0.5, 2.0, 1.5)
    weights = [LoraWeights(torch.randn(r, 6), torch.randn(4, r)) for r in ranks]
    experts = [LayerExpert(e, w, c, 0.0) for e, w, c in zip((0, 1, 3), weights, scales, strict=True)]
    layer = adapted_layer(nn.Linear(6, 4), experts, 0).eval()
    x, scalings, W = torch.randn(2, 5, 6), torch.randn(2, 5, 1, 4), torch.randn(6, 4)

    def routing() -> Routing:
        return LayerRouting(lambda _, h: torch.softmax(h @ W, -1), 0.7) if in_layer else TensorRouting(scalings, 0.7)

    def run(x: Tensor) -> Tensor:
        return routed(routing(), layer, x)

    wanted = run(x)
    monkeypatch.setattr(LinearStack, "add_to", lambda stack, y, x, routing, *_: stack.add_fused(y, x, routing))
    call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    for tokens in (x, x.flatten(0, 1)):
        got = call(tokens)
        assert not torch.equal(got, layer.base_layer(tokens))
        assert_close(got.view(2, 5, 4), wanted, atol=1e-5, rtol=1e-5)
