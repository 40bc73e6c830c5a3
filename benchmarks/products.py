"""How a mixture layer's products are best made on a CPU: `python -m benchmarks.products` writes docs/products.md.

Two choices of the layer rest on these figures: where few of many experts have a non-zero scaling only their columns are
multiplied (`loramix.layers.routing.GATHERED_SHARE`), and layers with one input keep down projections of their own. The
last table says where the time of a decoded token goes in a layer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decode import one_token
from benchmarks.models import llama, save_experts
from benchmarks.sizes import SIZES
from loramix import XLoraConfig, get_peft_model
from loramix.experts.adapter import LoraWeights
from loramix.layers import routing as settings
from loramix.layers.layer import adapted_layer
from loramix.layers.routing import GATHERED_RANKS, GATHERED_SHARE, GATHERED_TOKENS, TensorRouting
from loramix.layers.slot import routed
from loramix.layers.stack import LayerExpert
from loramix.timing import describe_machine

RANK, TOP_K, EXPERTS = 8, 2, 8
CACHE = 64 * 2**20  # bytes of weights that are gone through, as a model's layers are
PAGE = """# Products of a mixture layer

One thread, CPU time, medians of interleaved rounds; {processor}, PyTorch {torch}. The weights of
many layers are used in turn, so that none is in the CPU's cache. To measure again: `python -m benchmarks.products`.

## Gathering the columns of few experts

Top {top_k} of E experts of rank {rank}, layers H → H: time of gathering their rank columns and multiplying those, over
that of multiplying all. T tokens have up to {top_k} T experts with a non-zero scaling.

{gathered}

Besides the products, the columns to gather must be found anew for each token. So the same comparison for a whole
model: the time of a decode step with gathering over that without (Llama, H 512, 8 blocks, seven linear layers each).

{steps}

So a layer gathers in float32 only, for up to {tokens} tokens, if at most 1/{share} of its rank columns have a non-zero
scaling and there are at least {ranks} columns. With a larger share, or in bfloat16, it saves less than 5 % where each
layer has its own scalings.

## One down projection for layers with one input

Query, key and value of a block get the same input. Time of one product with their three A stacked, over that of three
products, the rest of the layers included. It is near 1 where it matters, so each layer keeps its own A: stacked ones
would have to be views of a common tensor, which copying, moving and sharding break.

{shared}

## Where a token's time goes in a layer

One token, {experts} experts of rank {rank}, layers H → H, microseconds a layer: the base layer as the model calls it,
with the bare products and the gate after it, and the whole mixture layer. What the last column adds to the one before
are calls in Python: of the layer itself, of the routing, of what is checked.

{profile}
"""


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """The median over the rounds of the one's time over the other's."""
    one(), other()
    return median(seconds(one) / seconds(other) for _ in range(rounds))


def layers(hidden: int, ranks: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """A and B of as many layers as fill the cache, and no more than a model has."""
    count = max(3, min(60, CACHE // (2 * ranks * hidden * dtype.itemsize)))
    return [(torch.randn(ranks, hidden, dtype=dtype), torch.randn(hidden, ranks, dtype=dtype)) for _ in range(count)]


def gathered(hidden: int, experts: int, tokens: int, dtype: torch.dtype, rounds: int) -> float:
    """Gathering over multiplying all."""
    made = layers(hidden, experts * RANK, dtype)
    x, y = (torch.randn(1, tokens, hidden, dtype=dtype) for _ in range(2))
    columns = torch.rand(1, tokens, experts * RANK, dtype=dtype)
    chosen = torch.randperm(experts)[: min(experts, TOP_K * tokens)].sort().values
    ranks = (chosen[:, None] * RANK + torch.arange(RANK)).flatten()
    few = columns[..., ranks]

    def every() -> None:
        for A, B in made:
            y.add_(F.linear(F.linear(x, A).mul_(columns), B))

    def some() -> None:
        for A, B in made:
            y.add_(F.linear(F.linear(x, A.index_select(0, ranks)).mul_(few), B.index_select(1, ranks)))

    return ratio(some, every, rounds)


def step(experts: int, layerwise: bool, rounds: int) -> float:
    """A decode step of a whole model with gathering over one without."""
    size = replace(SIZES["small"], vocabulary=4096, experts=experts, rank=RANK)
    gating: dict[str, Any] = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": TOP_K}
    with tempfile.TemporaryDirectory() as folder:
        config = XLoraConfig(
            hidden_size=size.hidden,
            adapters=save_experts(Path(folder), size),
            layerwise_scalings=layerwise,
            **gating,
        )
        model: Any = get_peft_model(llama(size), config).eval()
    token = one_token(model, torch.randint(size.vocabulary, (1, size.prompt)))

    def with_share(share: int) -> Callable[[], None]:
        def call() -> None:
            settings.GATHERED_SHARE = share
            token()

        return call

    try:
        return ratio(with_share(1), with_share(2 * experts), rounds)
    finally:
        settings.GATHERED_SHARE = GATHERED_SHARE


def shared(hidden: int, ranks: int, tokens: int, rounds: int) -> float:
    """One stacked product for three layers over three."""
    made = layers(hidden, ranks, torch.float32)
    made = made[: len(made) // 3 * 3]
    groups = [made[i : i + 3] for i in range(0, len(made), 3)]
    stacked = [torch.cat([A for A, _ in group]) for group in groups]
    x, y = torch.randn(1, tokens, hidden), torch.randn(1, tokens, hidden)
    columns = torch.rand(1, tokens, ranks)

    def apart() -> None:
        for A, B in made:
            _add(y, F.linear(x, A).mul_(columns), B)

    def together() -> None:
        for A, group in zip(stacked, groups, strict=True):
            low_rank = F.linear(x, A).unflatten(-1, (3, ranks)).mul_(columns.unsqueeze(-2))
            for (_, B), h in zip(group, low_rank.unbind(-2), strict=True):
                _add(y, h, B)

    return ratio(together, apart, rounds)


def _add(y: Tensor, low_rank: Tensor, B: Tensor) -> None:
    y.view(-1, y.shape[-1]).addmm_(low_rank.reshape(-1, low_rank.shape[-1]), B.t())


def profile(hidden: int, rounds: int) -> list[float]:
    """Microseconds of a base layer, with the products of its experts, and as a mixture layer."""
    made = layers(hidden, EXPERTS * RANK, torch.float32)
    experts = [
        [
            LayerExpert(e, LoraWeights(a, b), 1.0, 0.0)
            for e, (a, b) in enumerate(zip(A.split(RANK), B.split(RANK, 1), strict=True))
        ]
        for A, B in made
    ]
    mixtures = [adapted_layer(nn.Linear(hidden, hidden, bias=False), r, i) for i, r in enumerate(experts)]
    routing = TensorRouting(torch.rand(1, 1, 1, EXPERTS), 1.0, [mixtures[0].stack])
    x, columns = torch.randn(1, 1, hidden), torch.rand(1, 1, EXPERTS * RANK)

    def base() -> None:
        for layer in mixtures:
            layer.base_layer(x)

    def bare() -> None:
        for layer in mixtures:
            layer.base_layer(x).add_(F.linear(F.linear(x, layer.stack.lora_A).mul_(columns), layer.stack.lora_B))

    def whole() -> None:
        for layer in mixtures:
            layer(x)

    calls = (base, bare, lambda: routed(routing, whole))
    times = [[seconds(call) for call in calls] for _ in range(rounds + 1)][1:]
    return [1e6 * median(column) / len(mixtures) for column in zip(*times, strict=True)]


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


@torch.no_grad()
def page(rounds: int, hiddens: tuple[int, ...] = (512, 1024), largest: int = 64, models: bool = True) -> str:
    """The whole page; without `models` the whole decode steps are left out."""
    counts = [E for E in (8, 16, 32, 64) if largest >= E]

    def gathered_rows() -> Iterable[list[str]]:
        for dtype in (torch.float32, torch.bfloat16):
            for hidden in hiddens:
                for tokens in (1, 2, 8):
                    found = [f"{gathered(hidden, E, tokens, dtype, rounds):.2f}" for E in counts]
                    yield [str(dtype).removeprefix("torch."), str(hidden), str(tokens), *found]

    def shared_rows() -> Iterable[list[str]]:
        for hidden in hiddens:
            for tokens in (1, 2, 64, 256):
                found = [f"{shared(hidden, E * RANK, tokens, rounds):.2f}" for E in counts]
                yield [str(hidden), str(tokens), *found]

    def step_rows() -> Iterable[list[str]]:
        for layerwise in (False, True) if models else ():
            found = [f"{step(E, layerwise, 5 * rounds):.2f}" for E in counts[1:]]
            yield ["a layer" if layerwise else "all layers", *found]

    machine = describe_machine(["torch"])
    return PAGE.format(
        processor=machine["processor"],
        torch=machine["versions"]["torch"],
        top_k=TOP_K,
        rank=RANK,
        tokens=GATHERED_TOKENS,
        share=GATHERED_SHARE,
        ranks=GATHERED_RANKS,
        steps=table(["scalings of", *(f"E {E}" for E in counts[1:])], step_rows()),
        gathered=table(["dtype", "H", "tokens", *(f"E {E}" for E in counts)], gathered_rows()),
        shared=table(["H", "tokens", *(f"R {E * RANK}" for E in counts)], shared_rows()),
        experts=EXPERTS,
        profile=table(
            ["H", "base layer", "with bare products", "mixture layer"],
            ([str(hidden), *(f"{found:.0f}" for found in profile(hidden, 4 * rounds))] for hidden in hiddens),
        ),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Path("docs/products.md").write_text(page(rounds=9), encoding="utf-8")
