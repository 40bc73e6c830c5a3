"""Whole texts of a record. A text that forked shares its first tokens with another one, which holds them.

N: tokens of the record. M: tokens of one text. S: tokens of a text that is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from loramix.analysis.record.part import Part

Forks = Mapping[int, tuple[int, int]]
"""Text -> the text that it continues, and how many tokens of that precede its own."""


def path_of(whole: Part, forks: Forks, number: int) -> Int[Tensor, " M"]:
    """The places of a text's tokens among all tokens, from its beginning; none where there is no such text."""
    rows, end = list[Tensor](), None
    while True:
        own = whole.sequence == number
        rows.insert(0, torch.nonzero(own if end is None else own & (whole.position < end)).flatten())
        if number not in forks:
            return torch.cat(rows)
        number, place = forks[number]
        end = place if end is None else min(end, place)


def text_of(whole: Part, forks: Forks, ids: Int[Tensor, " S"]) -> int | None:
    """The number of the text that begins with these tokens; the last one need not have been read."""
    for number in whole.sequence.unique().tolist():
        path = path_of(whole, forks, number)
        text = whole.token[path][: len(ids)]
        begins = len(path) and int(whole.position[path[0]]) == 0
        if begins and len(text) >= max(1, len(ids) - 1) and torch.equal(text, ids[: len(text)]):
            return number
    return None
