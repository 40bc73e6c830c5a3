"""The texts of a record whose tokens are shared: one that forked goes on from another one.

N: tokens. M: those of one text. S: tokens that are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from loramix.analysis.record.parts import Part

Forks = Mapping[int, tuple[int, int]]
"""Text -> the text that it goes on with, and how many tokens of that come before its own."""


def path_of(whole: Part, forks: Forks, number: int) -> Int[Tensor, " M"]:
    """Which of all tokens a text consists of, from its beginning; none where there is no such text."""
    rows, end = list[Tensor](), None
    while True:
        own = whole.sequence == number
        rows.insert(0, torch.nonzero(own if end is None else own & (whole.position < end)).flatten())
        if number not in forks:
            return torch.cat(rows)
        number, place = forks[number]
        end = place if end is None else min(end, place)


def text_of(whole: Part, forks: Forks, ids: Int[Tensor, " S"]) -> int | None:
    """The number of the text that begins with these tokens; the last one need not be there."""
    for number in whole.sequence.unique().tolist():
        path = path_of(whole, forks, number)
        text = whole.token[path][: len(ids)]
        begins = len(path) and int(whole.position[path[0]]) == 0
        if begins and len(text) >= max(1, len(ids) - 1) and torch.equal(text, ids[: len(text)]):
            return number
    return None
