"""Several mixtures on one base model: the bytes of all their tensors, and what choosing one costs a forward."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Models, llama
from loramix import PeftModel
from loramix.timing import Contender, Measurement, interleave

COUNTS = (1, 2, 4, 8)
FLOAT = 4


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Bytes for each number of mixtures; then a forward, each with the next of two mixtures."""
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder:
        models.loramix.save_pretrained(folder)
        model: Any = PeftModel.from_pretrained(llama(models.size), folder, "1")
        alone, base = bytes_of(tensors(model)), bytes_of(tensors(models.base))
        for count in COUNTS:
            for number in range(len(model.mixtures) + 1, count + 1):
                model.load_mixture(folder, str(number))
            held = {"base": base, "loramix": bytes_of(tensors(model)), "loramix, a base each": count * alone}
            samples = {name: [float(each)] for name, each in held.items()}
            limit = 1 + count * FLOAT * models.weights.experts / base
            found.append(Measurement(f"tensors, mixtures: {count}", samples, limit, unit="B"))
    for name in model.mixtures[2:]:
        model.unload_mixture(name)
    turn = 0

    @torch.no_grad()
    def forward(net: Any) -> None:
        net(input_ids=models.prompt)

    def next_mixture() -> None:
        nonlocal turn
        turn += 1
        with model.use_mixture(str(1 + turn % 2)):
            forward(model)

    contenders = [
        Contender("base", lambda: forward(models.base)),
        Contender("loramix", next_mixture),
        Contender("loramix, one mixture", lambda: forward(models.loramix)),
    ]
    times = interleave(contenders, rounds, warm_ups=2)
    work = f"forward of {models.size.prompt} tokens, two mixtures in turn"
    return [*found, Measurement(work, times, models.weights.forward_limit())]


def tensors(model: Any) -> Iterator[Tensor]:
    """The tensors of a model, of all its mixtures."""
    if not isinstance(model, PeftModel):
        yield from own_tensors(model)
        return
    mixtures: Any = model
    for name in mixtures.mixtures:
        with mixtures.use_mixture(name):
            yield from own_tensors(mixtures)


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """What they hold, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
