"""`python -m benchmarks.killed_saves`: a process that saves is killed; what it leaves is one of the two whole states.

    python -m benchmarks.killed_saves --tries 200

A child saves two mixtures into one folder, the one after the other, without end, until it is killed by SIGKILL at a
moment drawn at random. Then the folder is loaded: its logits are those of one of the two.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.mutations import IDS, logits, mixture

LONGEST = 0.1
"""Seconds after which the child is killed at the latest: some saves long."""


def killed(folder: Path, tries: int, seed: int) -> Iterator[str]:
    """What each try leaves: "first" or "second".

    Raises:
        LoramixError, AssertionError: neither.
    """
    models: list[Any] = []
    for number, scalings in enumerate(({}, {"layerwise_scalings": True})):
        models.append(mixture(folder / f"experts-{number}", **scalings).eval())
    with torch.no_grad():
        expected = [model(IDS).logits for model in models]
    place = folder / "saved"
    models[0].save_pretrained(place)
    rng = random.Random(seed)
    for _ in range(tries):
        child = os.fork()
        if child == 0:
            while True:
                for model in reversed(models):
                    model.save_pretrained(place)
        time.sleep(rng.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = logits(place)
        same = [torch.equal(found, each) for each in expected]
        assert any(same), "the folder holds neither of the two states"
        yield ("first", "second")[same.index(True)]


def main(
    tries: Annotated[int, typer.Option(help="How often the child is killed.")] = 200,
    seed: Annotated[int, typer.Option(help="What draws the moments.")] = 0,
) -> None:
    """Kill a process that saves, and load what it leaves."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(dict(Counter(killed(Path(folder), tries, seed))))


if __name__ == "__main__":
    typer.run(main)
