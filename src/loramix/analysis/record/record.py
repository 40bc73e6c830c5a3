"""A routing record: the final scalings of each token, to select from, to measure and to save.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loramix.analysis.metrics import RoutingMeter, RoutingMetrics, leading_of
from loramix.analysis.record.files import load_record, save_record
from loramix.analysis.record.header import Header
from loramix.analysis.record.notebook import TOKENS, routing_html
from loramix.analysis.record.part import Part, joined
from loramix.analysis.record.selection import TokenSelection, row_of_ids, token_mask
from loramix.analysis.record.stores import MemorySource, Source
from loramix.analysis.record.table import table_of
from loramix.analysis.record.texts import path_of, text_of
from loramix.analysis.record.token_text import pieces_of, require_same_text, require_tokenizer, token_texts
from loramix.errors import RoutingError
from loramix.experts.selection import Selection, is_mask, listed, plain_selection, select
from loramix.files.tensors import all_finite


class RoutingRecord:
    """The final scalings, those after top-k, of the tokens that a mixture has read.

    Made by `record_routing`, or read by `RoutingRecord.load`. A record in several parts reads them one after the
    other where it can: `metrics`, `select`, `save`; the properties that are tensors hold all of it.

    Attributes:
        header: what holds for all tokens.
        source: where the tokens are read from.
        tokenizer: for the tokens' text; None where it is not known.

    Raises:
        RoutingError: what is no tokenizer.
    """

    def __init__(
        self,
        header: Header,
        source: Source,
        tokenizer: Any = None,
        vocabulary: Mapping[int, str] | None = None,
        palette: Sequence[str] | None = None,
    ) -> None:
        if tokenizer is not None:
            require_tokenizer(tokenizer)
        self.header, self.source, self.tokenizer = header, source, tokenizer
        self._vocabulary = dict(vocabulary or {})
        self._palette = None if palette is None else list(palette)

    @property
    def experts(self) -> list[str]:
        """The E experts, in the order of the scalings."""
        return list(self.header.experts)

    @property
    def palette(self) -> list[str]:
        """All experts of the mixture, to colour by (`expert_colours`), also where a selection has fewer."""
        return list(self.header.palette if self._palette is None else self._palette)

    @property
    def layers(self) -> list[str]:
        """The L layers; where they share their scalings, which are then kept once, the one name "all layers"."""
        return list(self.header.layers)

    @property
    def shared(self) -> bool:
        """Whether all adapted layers share their scalings."""
        return self.header.shared

    @property
    def top_k(self) -> int | None:
        """The mixture's top-k; None where all experts have a scaling."""
        return self.header.settings.get("top_k_lora")

    @property
    def seen(self) -> int:
        """The number of tokens that were read."""
        _ = self.source.kept  # counts the last forward too
        return self.header.seen

    @property
    def kept(self) -> int:
        """The number of tokens that the record holds: N."""
        return self.source.kept

    @property
    def is_sample(self) -> bool:
        """Whether tokens that were read are missing."""
        return self.header.sample or self.seen > self.kept

    @property
    def note(self) -> str:
        """What the record holds, in one sentence; and why, if it is nothing."""
        return self.header.describe(self.kept)

    def __len__(self) -> int:
        return self.kept

    def __repr__(self) -> str:
        return f"<RoutingRecord: {self.note}>"

    def _repr_html_(self) -> str:
        """For notebooks: the note, the experts, and the first tokens in the colours of the leading experts."""
        try:
            metrics = self.metrics()
        except RoutingError as error:
            return f"<p>{escape(str(error) if self.kept else self.note)}</p>"
        first = self.select(tokens=torch.arange(self.kept) < TOKENS)
        return routing_html(self.note, metrics, self.experts, self.palette, first.pieces(), first.weights)

    def parts(self) -> Iterator[Part]:
        """The tokens in parts, each sorted by text and position; while it is recorded, those that are there now."""
        return self.source.parts()

    def measurable(self) -> Iterator[Part]:
        """The same parts, checked: they can be measured and drawn.

        Raises:
            RoutingError: nothing was recorded, or scalings that are nan or infinite.
        """
        count = 0
        for part in self.parts():
            if not all_finite([part.scalings]):
                raise RoutingError(
                    "Scalings are finite numbers.",
                    received=f"nan or inf among those of {', '.join(self.experts)}"[:300],
                    remedy="look for such numbers in the weights of the router and the base model; "
                    "record.to_pandas() has the tokens",
                )
            count += len(part)
            yield part
        if not count:
            raise RoutingError(
                "Numbers and pictures need recorded tokens.",
                received=self.note,
                remedy="run the mixture inside record_routing(model), with its adapters on and its routing not fixed",
            )

    def require_measurable(self) -> None:
        """Raises RoutingError: as `measurable` does."""
        for _ in self.measurable():
            pass

    @property
    def part(self) -> Part:
        """All tokens in one part, sorted by text and position."""
        return self._whole(self.parts())

    @property
    def measurable_part(self) -> Part:
        """The same, checked as by `measurable`."""
        return self._whole(self.measurable())

    def _whole(self, parts: Iterator[Part]) -> Part:
        return joined(parts, len(self.layers), len(self.experts)).by_text()

    @property
    def scalings(self) -> Float[Tensor, "N L E"]:
        """The final scalings s of each token."""
        return self.part.scalings

    @property
    def weights(self) -> Float[Tensor, "N E"]:
        """The mean of s over the layers: the weight of each expert in each token."""
        return self.scalings.mean(1)

    @property
    def leading(self) -> Int[Tensor, " N"]:
        """The number of the expert with the largest weight; -1 where no selected expert has any."""
        return leading_of(self.weights)

    @property
    def tokens(self) -> Int[Tensor, " N"]:
        """Token ids; -1 where the model was given embeddings."""
        return self.part.token

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """The position of each token in its text, from 0."""
        return self.part.position

    @property
    def sequence_numbers(self) -> Int[Tensor, " N"]:
        """The number of each token's text."""
        return self.part.sequence

    @property
    def sequences(self) -> list[int]:
        """The numbers of the texts that the record holds tokens of."""
        found = torch.cat([part.sequence.unique() for part in self.parts()] or [torch.zeros(0, dtype=torch.long)])
        return sorted(set(found.tolist()))

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
            experts: likewise. Scalings are not renormalised: those of a token need not add up to 1 any more.
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
            RoutingError: no such text, a record that is a sample, or what is no row of ids.
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

    def pieces(self) -> list[str]:
        """The text of each token; "#id" without a tokenizer.

        The pieces of consecutive tokens add up to their text: a character of several tokens is in the last one's piece.
        """
        return self._texts(self.part)

    def _texts(self, part: Part) -> list[str]:
        if self.tokenizer is not None:
            return pieces_of(self.tokenizer, part)
        return [self._vocabulary.get(token, f"#{token}") for token in part.token.tolist()]

    def vocabulary(self) -> dict[int, str]:
        """The text of each recorded token id on its own."""
        if self.tokenizer is None:
            return dict(self._vocabulary)
        return token_texts(self.tokenizer, {id for part in self.parts() for id in part.token.unique().tolist()})

    def metrics(self) -> RoutingMetrics:
        """The routing metrics over all tokens and layers.

        Raises:
            RoutingError: nothing was recorded.
        """
        return self._measured([slice(None)])[0]

    def metrics_by_layer(self) -> dict[str, RoutingMetrics]:
        """The routing metrics of each layer.

        Raises:
            RoutingError: nothing was recorded.
        """
        found = self._measured([slice(i, i + 1) for i in range(len(self.layers))])
        return dict(zip(self.layers, found, strict=True))

    def _measured(self, several: Sequence[slice]) -> list[RoutingMetrics]:
        """The metrics of several slices of layers, in one pass over the parts."""
        meters = [RoutingMeter() for _ in several]
        for part in self.measurable():
            for meter, layers in zip(meters, several, strict=True):
                meter.add(part.scalings[None, :, layers])
        return [result for meter in meters if (result := meter.result()) is not None]

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
            CorruptCheckpointError: files that are not what they should be.
            IncompleteCheckpointError: a file of tokens is missing.
            RoutingError: what is no tokenizer, or one that reads the tokens as other text.
        """
        header, source, vocabulary = load_record(Path(folder))
        record = RoutingRecord(header, source, tokenizer, vocabulary)
        if tokenizer is not None:
            require_same_text(tokenizer, vocabulary)
        return record
