"""A routing record: the final scalings of each token, to select from, to measure and to save."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from loramix.analysis.record.files import load_record, save_record
from loramix.analysis.record.header import Header
from loramix.analysis.record.notebook import TOKENS, routing_html
from loramix.analysis.record.part import Part
from loramix.analysis.record.selection import TokenSelection, row_of_ids, token_mask
from loramix.analysis.record.stores import MemorySource
from loramix.analysis.record.table import table_of
from loramix.analysis.record.texts import path_of, text_of
from loramix.analysis.record.token_text import require_same_text
from loramix.analysis.record.tokens import RecordedTokens
from loramix.errors import RoutingError
from loramix.experts.selection import Selection, is_mask, listed, plain_selection, select


class RoutingRecord(RecordedTokens):
    """The final scalings, those after top-k, of the tokens that a mixture has read.

    Made by `record_routing`, or read by `RoutingRecord.load`. A record in several parts reads them one after the
    other where it can: `metrics`, `select`, `save`; the properties that are tensors hold all of it.

    Attributes:
        header: what is the same for all tokens.
        source: where the tokens are read from.
        tokenizer: for the tokens' text; None if it is not known.

    Raises:
        RoutingError: `tokenizer` is not a tokenizer.
    """

    def _repr_html_(self) -> str:
        """For notebooks: the note, the experts, and the first tokens in the colours of the leading experts."""
        try:
            metrics = self.metrics()
        except RoutingError as error:
            return f"<p>{escape(str(error) if self.kept else self.note)}</p>"
        first = self.select(tokens=torch.arange(self.kept) < TOKENS)
        return routing_html(self.note, metrics, self.experts, self.palette, first.pieces(), first.weights)

    def select(
        self,
        *,
        tokens: TokenSelection | None = None,
        layers: Selection | None = None,
        experts: Selection | None = None,
        sequences: Selection | None = None,
    ) -> RoutingRecord:
        """Some tokens, layers and experts, as a record in memory.

        Args:
            tokens: positions in the texts, as a number, a slice or a list; a pattern of the token's text as in file
                names (`"*ing"`); or a mask (N,), True for the tokens to keep, as a tensor, an array or a list.
            layers: a number, a name or a pattern (`"*q_proj"`), or a list of them.
            experts: likewise. Scalings are not renormalised: those of a token may no longer sum to 1.
            sequences: numbers of texts, likewise.

        Raises:
            RoutingError: a selection without a token, a layer or an expert; or layers where all share their scalings.
        """
        if layers is not None and self.shared:
            raise RoutingError(
                "Layers are told apart where each has its own scalings.",
                received=f"layers={layers!r}, and one routing that all {len(self.header.adapted)} layers share",
                remedy="leave layers= out; a mixture with layerwise_scalings=True routes each layer by itself",
            )
        rows = None if layers is None else select("layer", self.layers, plain_selection(layers))
        columns = None if experts is None else select("expert", self.experts, plain_selection(experts))
        found: list[Part] = []
        for part in self._selected(plain_selection(tokens, mask=True), plain_selection(sequences, names=False)):
            scalings = part.scalings if rows is None else part.scalings[:, rows]
            found.append(replace(part, scalings=scalings if columns is None else scalings[:, :, columns]))
        header = self._own_header()
        header.layers = header.layers if rows is None else [self.layers[i] for i in rows]
        header.experts = header.experts if columns is None else [self.experts[i] for i in columns]
        return self._with(header, found)

    def _selected(self, tokens: Any, sequences: Any) -> Iterator[Part]:
        """The parts with the selected tokens alone.

        Raises:
            RoutingError: a selection without a token.
        """
        masked, count = is_mask(tokens), 0
        for part in [self.part] if masked else self.parts():
            if tokens is not None or sequences is not None:
                pieces = self._texts(part) if isinstance(tokens, str | list) and not masked else None
                part = part[token_mask(part, tokens, sequences, pieces)]
            count += len(part)
            yield part
        if self.kept and not count:
            asked = {"tokens": "a mask that is False everywhere" if masked else tokens, "sequences": sequences}
            raise RoutingError(
                "A selection has at least one token.",
                received=", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None),
                remedy="look at record.sequences, record.positions and record.pieces() for what there is",
            )

    def _own_header(self) -> Header:
        """The header of a selection, before anything is left out."""
        return replace(copy.deepcopy(self.header), palette=self.palette, sample=self.is_sample)

    def _with(self, header: Header, parts: list[Part]) -> RoutingRecord:
        header.seen = sum(map(len, parts))
        return RoutingRecord(header, MemorySource(parts), self.tokenizer, self._vocabulary)

    def coloured_by(self, names: Sequence[str]) -> RoutingRecord:
        """The same, with the colours that its experts have among these names (`expert_colours`).

        Raises:
            RoutingError: its experts are not all among them, or they have no order.
        """
        missing = [name for name in self.experts if name not in names]
        if missing or isinstance(names, str | Set):
            raise RoutingError(
                "An expert's colour is that of its place among all names.",
                received=f"names without {listed(missing)}: {listed(list(names))}" if missing else f"{names!r}"[:200],
                remedy="pass all experts of both mixtures, such as [*one.palette, *other.palette]",
            )
        return RoutingRecord(self.header, self.source, self.tokenizer, self._vocabulary, names)

    def sequence(self, number: SupportsIndex) -> RoutingRecord:
        """A whole text: its own tokens, after those that it shares with the text that it forked from.

        Raises:
            RoutingError: no such text.
        """
        whole, wanted = self.part, plain_selection(number, names=False)
        path = path_of(whole, self.header.forks, wanted if isinstance(wanted, int) else -1)
        if not len(path):
            raise RoutingError(
                "A text is named by its number.",
                received=f"text {number!r}; the record has {listed(self.sequences)}",
                remedy="pass one of record.sequences",
            )
        part = whole[path]
        header = self._own_header()
        header.forks = {}
        return self._with(header, [replace(part, sequence=torch.full_like(part.sequence, wanted))])

    def following(self, ids: Iterable[SupportsIndex] | Tensor) -> RoutingRecord:
        """The text that begins with these tokens, as `generate` returned them: one of its beams, for example.

        Args:
            ids: without padding. The last one need not have been read.

        Raises:
            RoutingError: no such text, a record that is a sample, or `ids` that is not a row of ids.
        """
        wanted = torch.tensor(row_of_ids(ids), dtype=torch.long)
        number = None if self.is_sample else text_of(self.part, self.header.forks, wanted)
        if number is not None:
            return self.sequence(number).select(tokens=slice(0, len(wanted)))
        raise RoutingError(
            "A text is found by all tokens that it begins with.",
            received=f"{len(wanted)} tokens, in {'a sample' if self.is_sample else 'no text of the record'}",
            remedy="pass one row of ids without its padding, and record with a larger max_tokens=, or with spill=",
        )

    def to_pandas(self) -> Any:
        """A table with a row for each token, layer and expert: sequence, position, token, layer, expert, scaling.

        Raises:
            UnsupportedOperationError: pandas is missing.
        """
        return table_of(self.part, self.layers, self.experts)

    def save(self, folder: str | PathLike[str]) -> None:
        """Save as `record.json` and `tokens-00000.safetensors` (format: `loramix.analysis.record.files`).

        Raises:
            SaveError: the folder could not be written; an earlier record in it is whole.
        """
        save_record(self, Path(folder))

    @staticmethod
    def load(folder: str | PathLike[str], tokenizer: Any = None) -> RoutingRecord:
        """Read a record that `save` or `record_routing(spill=…)` wrote; its tokens stay on disk until asked for.

        Args:
            folder: where the record is.
            tokenizer: of the mixture, for the text of the tokens; without it each has the text of its id on its own.

        Raises:
            CheckpointNotFoundError: no record there, or one that was not finished.
            CorruptCheckpointError: invalid files.
            IncompleteCheckpointError: a file of tokens is missing.
            RoutingError: `tokenizer` is not a tokenizer, or it decodes the tokens to another text.
        """
        header, source, vocabulary = load_record(Path(folder))
        record = RoutingRecord(header, source, tokenizer, vocabulary)
        if tokenizer is not None:
            require_same_text(tokenizer, vocabulary)
        return record
