"""Many threads on one model get the numbers that each of them gets alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from support.mixtures import far, mixture
from support.tiny import llama, tokens

THREADS, ROUNDS = 8, 4


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def model(experts: Any) -> Any:
    return mixture(experts("llama"), layerwise_scalings=True, scaling_pass_value=0.2)


@torch.no_grad()
def forward(model: Any, i: int) -> Tensor:
    return model(tokens(1 + i % 3, 3 + i, seed=i)).logits


def generate(model: Any, i: int) -> Tensor:
    return model.generate(tokens(1 + i % 3, 3 + i, seed=i), max_new_tokens=4, do_sample=False)


def disabled(model: Any, i: int) -> Tensor:
    with model.disable_adapter():
        return forward(model, i)


def fixed(model: Any, i: int) -> Tensor:
    with model.fixed_scalings([i / 8, 0.5, 1 - i / 8]):
        return forward(model, i)


@torch.enable_grad()
def gradient(model: Any, i: int) -> Tensor:
    ids = tokens(1 + i % 3, 3 + i, seed=i)
    parameters = list(model.internal_xlora_classifier.parameters())
    return torch.autograd.grad(model(ids, labels=ids).loss, parameters)[0]


WORK: dict[str, list[Callable[[Any, int], Tensor]]] = {
    "forwards": [forward],
    "generates": [generate],
    "gradients": [gradient],
    "everything": [forward, generate, disabled, fixed, gradient],
}


@pytest.mark.parametrize("work", WORK)
def test_together_equals_alone(model: Any, work: str) -> None:
    jobs = [(WORK[work][i % len(WORK[work])], i) for i in range(THREADS)]
    alone = [job(model, i) for job, i in jobs]
    start = threading.Barrier(THREADS)

    def run(job: Callable[[Any, int], Tensor], i: int) -> list[Tensor]:
        start.wait()
        return [job(model, i) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda pair: run(*pair), jobs))
    for expected, several in zip(alone, found, strict=True):
        assert all(torch.equal(one, expected) for one in several)


def test_disabling_in_one_thread_does_not_reach_another(model: Any) -> None:
    whole = forward(model, 1)
    with model.disable_adapter(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(forward, model, 1).result(), whole)
        assert far(forward(model, 1), whole)
        assert torch.equal(forward(model, 1), forward(llama(), 1))


def test_two_mixtures_in_one_thread_do_not_meet(model: Any, experts: Any) -> None:
    other = mixture(experts("llama"), top_k_lora=1)
    one, two = forward(model, 2), forward(other, 2)
    with model.disable_adapter():
        assert torch.equal(forward(other, 2), two)
    with other.fixed_scalings([1.0, 0.0, 0.0]):
        assert torch.equal(forward(model, 2), one)
