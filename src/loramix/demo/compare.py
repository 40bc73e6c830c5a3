"""The comparison: bits per byte of held-out text for the base, each expert alone, both mixtures and the oracle."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from loramix.demo.corpus import DOMAINS
from loramix.demo.text import heldout_passages, switching_passages
from loramix.evaluation.passages import Passage
from loramix.evaluation.scores import BASE, MIXTURE, ORACLE, Score, measure, rows, total
from loramix.model.build import XLoraModel

XLORA = MIXTURE
MIXED, SWITCHING = "mixed", "switching"
COLUMNS = (*DOMAINS, MIXED, SWITCHING)

Scores = dict[str, dict[str, Score]]
"""Column, then the domain that the text comes from."""


@dataclass(frozen=True)
class Comparison:
    """Bits per byte, lower is better.

    Attributes:
        bits_per_byte: by row (base, each expert, uniform, X-LoRA, oracle), then by column (each domain, mixed,
            switching).
        best_expert: for each domain, the expert that is best on its own there; the oracle uses it, told the domain.
        bytes: the bytes of text in each column.
    """

    bits_per_byte: dict[str, dict[str, float]]
    best_expert: dict[str, str]
    bytes: dict[str, int]

    @property
    def rivals(self) -> list[str]:
        """The rows that the router has to beat: each expert alone, and the uniform mixture."""
        return [row for row in self.bits_per_byte if row not in (BASE, XLORA, ORACLE)]

    @property
    def router_earns_its_place(self) -> bool:
        """Whether X-LoRA beats these rows and the base model, on mixed and on switching text."""
        return all(
            self.bits_per_byte[XLORA][c] < self.bits_per_byte[row][c]
            for row in (BASE, *self.rivals)
            for c in (MIXED, SWITCHING)
        )


def heldout_columns(tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, list[Passage]]:
    """Held-out text: `count` windows of each domain, and `count` that switch domain within a sequence."""
    columns = {domain: heldout_passages(tokenizer, domain, count) for domain in DOMAINS}
    return columns | {SWITCHING: switching_passages(tokenizer, count)}


def compare(model: XLoraModel, columns: dict[str, list[Passage]]) -> Comparison:
    """Measure every row on every column.

    Args:
        model: a mixture whose experts are named after the domains.
        columns: held-out text by column, from `heldout_columns`; "mixed" is the text of all domains together.
    """
    found: dict[str, Scores] = {}
    for row, setting in rows(model, leave_one_out=False):
        with setting:
            found[row] = {column: measure(model, passages) for column, passages in columns.items()}
    best = {d: min(model.expert_names, key=lambda expert: _bits_per_byte(found[expert], d)) for d in DOMAINS}
    found[ORACLE] = {
        column: {domain: found[best[domain]][column][domain] for domain in scores}
        for column, scores in found[BASE].items()
    }
    return Comparison(
        bits_per_byte={row: {c: _bits_per_byte(scores, c) for c in COLUMNS} for row, scores in found.items()},
        best_expert=best,
        bytes={c: _column(found[BASE], c).bytes for c in COLUMNS},
    )


def _column(scores: Scores, column: str) -> Score:
    if column == MIXED:
        return total(_column(scores, domain) for domain in DOMAINS)
    return total(scores[column].values())


def _bits_per_byte(scores: Scores, column: str) -> float:
    return _column(scores, column).bits_per_byte
