"""How a mixture layer's products are best made on a CPU: `python -m benchmarks.products` writes docs/products.md.

Two choices of the layer stand on these figures: experts that no token weighs are left out where they are most of all
(`loramix.layers.scalings.gathered_share`), and layers with one input keep down projections of their own. A third table
says
where the time of a decoded token goes in a layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loramix.experts.adapter import LoraWeights
from loramix.layers.layer import Resident, XLoraLinear
from loramix.layers.scalings import GATHERED_RANKS, GATHERED_TOKENS, TensorRouting, gathered_share, routed
from loramix.timing import describe_machine

RANK, TOP_K, EXPERTS = 8, 2, 8
CACHE = 64 * 2**20  # bytes of weights that are gone through, as a model's layers are
PAGE = """# Products of a mixture layer

One thread, CPU time, medians of interleaved rounds; {processor}, PyTorch {torch}. Weights of many layers in turn, so
that none waits in the cache. To measure again: `python -m benchmarks.products`.

## Gathering the experts that are weighed

Top {top_k} of E experts of rank {rank}, layers H → H: time of gathering their rank columns and multiplying those, over
that of multiplying all. For T tokens up to {top_k} T experts are weighed. A layer gathers for up to {tokens} tokens
where at most one rank column in {single} is weighed (float32), or in {half} (other dtypes), of at least {ranks}.

{gathered}

## One down projection for layers with one input

Query, key and value of a block get the same input. Time of one product with their three A stacked, over that of three
products, the rest of the layers included. Around 1 where it matters, so each layer keeps its own A: stacked ones would
have to be views of a common tensor, which copies, devices and shards take apart.

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
    weighed = columns[..., ranks]

    def every() -> None:
        for A, B in made:
            y.add_(F.linear(F.linear(x, A).mul_(columns), B))

    def some() -> None:
        for A, B in made:
            y.add_(F.linear(F.linear(x, A.index_select(0, ranks)).mul_(weighed), B.index_select(1, ranks)))

    return ratio(some, every, rounds)


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
    residents = [
        [
            Resident(e, LoraWeights(a, b), 1.0, 0.0)
            for e, (a, b) in enumerate(zip(A.split(RANK), B.split(RANK, 1), strict=True))
        ]
        for A, B in made
    ]
    mixtures = [XLoraLinear(nn.Linear(hidden, hidden, bias=False), r, i) for i, r in enumerate(residents)]
    routing = TensorRouting(torch.rand(1, 1, 1, EXPERTS), 1.0, mixtures[:1])
    x, columns = torch.randn(1, 1, hidden), torch.rand(1, 1, EXPERTS * RANK)

    def base() -> None:
        for layer in mixtures:
            layer.base_layer(x)

    def bare() -> None:
        for layer in mixtures:
            layer.base_layer(x).add_(F.linear(F.linear(x, layer.lora_A).mul_(columns), layer.lora_B))

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
def page(rounds: int, hiddens: tuple[int, ...] = (512, 1024), largest: int = 64) -> str:
    """The whole page."""
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

    machine = describe_machine(["torch"])
    return PAGE.format(
        processor=machine["processor"],
        torch=machine["versions"]["torch"],
        top_k=TOP_K,
        rank=RANK,
        tokens=GATHERED_TOKENS,
        single=gathered_share(torch.float32),
        half=gathered_share(torch.bfloat16),
        ranks=GATHERED_RANKS,
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
