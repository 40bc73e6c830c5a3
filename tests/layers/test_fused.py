"""When a layer takes the fused kernels, and that they are right: in Triton's interpreter, its compiler, on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from loramix.experts.adapter import LoraWeights
from loramix.layers import fused, linear
from loramix.layers.layer import adapted_layer
from loramix.layers.routing import ConstantRouting, LayerRouting
from loramix.layers.slot import routed
from loramix.layers.stack import LayerExpert

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = torch.device("cuda:0")


def run_apart(file: str, *options: str, **environment: str) -> None:
    """Pytest on a file of this folder, in a new process and without the shape checker."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [*command, str(HERE / file), *options],
        cwd=HERE.parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
def test_in_tritons_interpreter() -> None:
    run_apart("kernel_in_interpreter.py", TRITON_INTERPRET="1")


@needs_triton
@needs_gpu
@pytest.mark.parametrize("case", ["small_products", "eager", "graph", "compiled"])
def test_on_a_gpu(case: str) -> None:
    run_apart("kernel_on_gpu.py", "-k", case)


@needs_triton
@pytest.mark.parametrize("wide", [True, False])
def test_a_tiling_covers_all_inputs_and_ends_in_no_empty_share(wide: bool) -> None:
    from loramix.layers.kernels import tiling

    seen = set[int]()
    for tokens, inputs, R in itertools.product((1, 7, 128, 129, 4000), (1, 64, 1000, 4096, 14336), (1, 24, 512, 4096)):
        cut = tiling(tokens, inputs, R, wide=wide)
        assert cut.share % cut.inputs == 0
        assert cut.splits * cut.share >= inputs > (cut.splits - 1) * cut.share
        assert min(cut.tokens, cut.ranks, cut.inputs, cut.outputs, cut.depth) >= 16
        seen.add(cut.splits)
    assert seen == {1, 2, 4, 8, 16}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_the_kernels_and_they_fit(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the 99 KiB of shared memory that a program has on the smallest of these GPUs (8.6, 8.9, 12.0)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loramix.layers.kernels import expand, shrink, tiling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not said

    def compiled(kernel: Any, constants: dict[str, int], types: dict[str, str], **options: int) -> Any:
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        aligned = [n for n in names if n not in constants and n != "tokens"]
        source = ASTSource(
            kernel,
            signature,
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    for tokens, inputs in ((1, 14336), (129, 14336)):  # both ways in which the work is cut, with the most shares
        cut = tiling(tokens, inputs, 64, wide=dtype == "fp32")
        tile = {"GATED": 1, "TOKENS": cut.tokens, "RANKS": cut.ranks, "INPUTS": cut.inputs}
        types = dict.fromkeys(("y", "x", "A", "B", "columns"), f"*{dtype}") | {"shares": "*fp32"}
        first, ungated = compiled(shrink, tile, types), compiled(shrink, tile | {"GATED": 0}, types)
        tile = {"SPLITS": cut.splits, "TOKENS": cut.tokens, "OUTPUTS": cut.outputs, "RANKS": cut.depth}
        second = compiled(expand, tile, types, num_stages=2)
        assert all(kernel.asm["cubin"] and kernel.metadata.shared <= 99 * 1024 for kernel in (first, ungated, second))
        assert "tf32" not in first.asm["ptx"] + ungated.asm["ptx"] + second.asm["ptx"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """y, x, A and B as tensors without data on a GPU where the kernels are proven."""
    monkeypatch.setattr(fused, "ENABLED", True)
    monkeypatch.setattr(fused, "PLAIN", (*fused.PLAIN, FakeTensor))
    monkeypatch.setattr(fused, "_proven", {(GPU, torch.float32): True, (GPU, torch.bfloat16): False})
    sizes = {"y": (2, 3, 5), "x": (2, 3, 4), "A": (7, 4), "B": (5, 7)}
    with FakeTensorMode(), torch.no_grad():
        yield {name: torch.empty(size, device=GPU) for name, size in sizes.items()}


def test_the_kernels_are_for_one_dtype_on_one_gpu(gpu: dict[str, Tensor]) -> None:
    assert fused.usable(**gpu)
    for name, tensor in gpu.items():
        assert not fused.usable(**gpu | {name: tensor.cpu()})
        assert not fused.usable(**gpu | {name: tensor.to("cuda:1")})
        assert not fused.usable(**gpu | {name: tensor.half()})
        assert not fused.usable(**gpu | {name: tensor.double()})


def test_the_kernels_are_not_for_gradients_or_autocast(gpu: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.enable_grad():
        assert not fused.usable(**gpu)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert not fused.usable(**gpu)


def test_the_kernels_are_for_whole_rows_of_the_same_tokens(gpu: dict[str, Tensor]) -> None:
    assert not fused.usable(**gpu | {"x": torch.empty_strided((2, 3, 4), (12, 1, 3), device=GPU)})
    assert not fused.usable(**gpu | {"y": torch.empty_strided((2, 3, 5), (5, 10, 1), device=GPU)})
    assert not fused.usable(**gpu | {"y": gpu["y"].flatten(0, 1)})


def test_the_kernels_are_only_where_they_are_enabled_and_proven(
    gpu: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not fused.usable(**{name: tensor.bfloat16() for name, tensor in gpu.items()})
    monkeypatch.setattr(fused, "PLAIN", (Tensor, nn.Parameter))
    assert not fused.usable(**gpu), "a tensor of another kind"
    monkeypatch.setattr(fused, "PLAIN", (FakeTensor,))
    assert fused.usable(**gpu)
    monkeypatch.setattr(fused, "ENABLED", False)
    assert not fused.usable(**gpu)


def test_a_cpu_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ENABLED", True)
    monkeypatch.setattr(fused, "_proven", {(torch.device("cpu"), torch.float32): True})
    with torch.no_grad():
        assert not fused.usable(torch.ones(3, 5), torch.ones(3, 4), torch.ones(7, 4), torch.ones(5, 7))


@pytest.fixture(scope="module")
def enabled() -> dict[str, bool]:
    """Whether the kernels are enabled in a module that is imported under each value of LORAMIX_FUSED, "" for none."""
    code = (
        "import importlib, importlib.util, os; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: name if name == 'triton' else found(name, *more)\n"
        "from loramix.layers import fused\n"
        "for switch in ('0', '1', ''):\n"
        "    os.environ['LORAMIX_FUSED'] = switch\n"
        "    if not switch: del os.environ['LORAMIX_FUSED']\n"
        "    print(switch, importlib.reload(fused).ENABLED, sep='=')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = (line.split("=") for line in done.stdout.splitlines())
    return {switch: value == "True" for switch, value in told}


@pytest.mark.parametrize(("switch", "expected"), [("0", False), ("1", True), ("", True)], ids=["0", "1", "unset"])
def test_the_environment_turns_the_kernels_off(switch: str, expected: bool, enabled: dict[str, bool]) -> None:
    assert enabled[switch] == expected


def test_small_products_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(fused, "_proven", {})
    monkeypatch.setattr(fused, "_error", lambda device, dtype, tokens: tried.append(tokens) or 0.0)
    cpu = torch.device("cpu")
    assert all(fused.proven(cpu, torch.float32) for _ in range(3))
    assert tried == list(fused.FEW_AND_MANY)


@pytest.mark.parametrize("wrong", [1e-2, float("nan"), RuntimeError("no C compiler")], ids=str)
def test_where_the_kernels_fail_the_layers_do_without(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(device: torch.device, dtype: torch.dtype, tokens: int) -> float:
        if tokens == fused.FEW_AND_MANY[0]:
            return 0.0
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    monkeypatch.setattr(fused, "_proven", {})
    monkeypatch.setattr(fused, "_error", error)
    with pytest.warns(UserWarning, match=rf"do not work on cpu in torch.float32 .*{wrong}.*LORAMIX_FUSED=0"):
        assert not fused.proven(torch.device("cpu"), torch.float32)
    assert not fused.proven(torch.device("cpu"), torch.float32)


def test_nothing_is_tried_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_proven", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not fused.proven(GPU, torch.float32)
    assert not fused._proven


class OnGpu(Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


def chosen(monkeypatch: pytest.MonkeyPatch, *, on_gpu: bool = True, train: bool = False, **changes: Any) -> list[str]:
    """The kernels' operators that a layer of two experts calls, where their own conditions hold."""
    calls: list[str] = []

    def called(name: str, result: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: calls.append(name) or result(*tensors)

    monkeypatch.setattr(linear, "usable", lambda *tensors: True)
    monkeypatch.setattr(linear, "add_mixture", called("add_mixture", lambda y, *more: y))
    monkeypatch.setattr(linear, "shrink", called("shrink", torch.nn.functional.linear))
    monkeypatch.setattr(linear, "expand", called("expand", lambda y, *more: y))
    extra = {name: changes.get(name) for name in ("bias", "magnitude")}
    experts = [
        LayerExpert(0, LoraWeights(torch.ones(2, 6), torch.ones(4, 2)), 1.0, 0.0),
        LayerExpert(1, LoraWeights(torch.ones(1, 6), torch.ones(4, 1), **extra), 1.0, changes.get("dropout", 0.0)),
    ]
    layer = adapted_layer(nn.Linear(6, 4), experts, 0).train(train)
    if changes.get("hook"):
        layer.base_layer.register_forward_hook(lambda *call: None)
    x = torch.ones(2, 3, 6)
    with torch.no_grad():
        routed(changes.get("routing", ConstantRouting(0.5)), layer, x.as_subclass(OnGpu) if on_gpu else x)
    return calls


def test_a_plain_linear_layer_on_a_gpu_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch) == ["add_mixture"]
    assert chosen(monkeypatch, dropout=0.1) == ["add_mixture"]
    assert chosen(monkeypatch, train=True) == ["add_mixture"]


def test_a_router_in_the_layer_stands_between_shrinking_and_expanding(monkeypatch: pytest.MonkeyPatch) -> None:
    def scalings(layer: int, low_rank: Tensor) -> Tensor:
        assert low_rank.shape == (2, 3, 3)
        return torch.ones(2, 3, 2)

    assert chosen(monkeypatch, routing=LayerRouting(scalings)) == ["shrink", "expand"]


@pytest.mark.parametrize(
    "changes",
    [
        {"on_gpu": False},
        {"magnitude": torch.ones(4)},
        {"bias": torch.ones(4)},
        {"dropout": 0.1, "train": True},
        {"hook": True},
    ],
    ids=["on a CPU", "DoRA", "LoRA bias", "active dropout", "a hook that may keep y"],
)
def test_any_other_does_not(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not chosen(monkeypatch, **changes)
