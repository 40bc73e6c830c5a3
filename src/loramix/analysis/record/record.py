"""What a mixture's routing was, token by token: to slice, to measure, to save.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loramix.analysis.metrics import RoutingMeter, RoutingMetrics, leading_of
from loramix.analysis.record.header import Header
from loramix.analysis.record.parts import Kept, Part, Source, joined
from loramix.analysis.record.pick import Picked, Tokens, chosen_rows, counted, is_mask, pick, plain, row_of, some
from loramix.analysis.record.pieces import one_by_one, pieces_of, require_tokenizer
from loramix.analysis.record.texts import path_of, text_of
from loramix.errors import RoutingError
from loramix.files.tensors import all_finite


class RoutingRecord:
    """The final scalings of tokens that a mixture has read, as the layers mixed by them: after top-k.

    Made by `record_routing`, or read by `RoutingRecord.load`. A record in several parts reads them one after the
    other where it can: `metrics`, `select`, `save`; the properties that are tensors hold all of it.

    Attributes:
        header: what holds for all tokens.
        source: where they are.
        tokenizer: for their text; None where it is not known.

    Raises:
        RoutingError: what is no tokenizer.
    """

    def __init__(
        self,
        header: Header,
        source: Source,
        tokenizer: Any = None,
        pieces: Mapping[int, str] | None = None,
        palette: Sequence[str] | None = None,
    ) -> None:
        if tokenizer is not None:
            require_tokenizer(tokenizer)
        self.header, self.source, self.tokenizer = header, source, tokenizer
        self._pieces = dict(pieces or {})
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
        """How many experts of a token had a scaling; None if all."""
        return self.header.settings.get("top_k_lora")

    @property
    def seen(self) -> int:
        """How many tokens were read."""
        _ = self.source.kept  # what is read now is counted once it is kept
        return self.header.seen

    @property
    def kept(self) -> int:
        """How many of them are here: N."""
        return self.source.kept

    @property
    def is_sample(self) -> bool:
        """Whether tokens are missing that were read."""
        return self.header.sample or self.seen > self.kept

    @property
    def note(self) -> str:
        """What is here, in one sentence; and why, if it is nothing."""
        if not self.seen and not self.kept:
            return (
                "Nothing was recorded: no forward made scalings. With adapters disabled, or with fixed scalings, none "
                "are made."
            )
        texts = f"{counted(self.kept, 'token')}, {counted(len(self.experts), 'expert')}, "
        adapted = counted(len(self.header.adapted), "layer")
        texts += f"one routing for all {adapted}" if self.shared else counted(len(self.layers), "layer")
        if self.seen > self.kept:
            texts += f"; a uniform sample of the {self.seen} tokens that were read"
        elif self.header.sample:
            texts += "; of a sample of the tokens that were read"
        if self.header.changed:
            texts += "; the mixture's settings changed meanwhile"
        return texts[0].upper() + texts[1:] + "."

    def __len__(self) -> int:
        return self.kept

    def __repr__(self) -> str:
        return f"<RoutingRecord: {self.note}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from loramix.analysis.show.notebook import record_html

        return record_html(self)

    def parts(self) -> Iterator[Part]:
        """The tokens, in parts; each in the order of the texts. Of a record under way, those that are there now."""
        return self.source.parts()

    def measurable(self) -> Iterator[Part]:
        """The same, for what is true of numbers alone.

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
        """All tokens in one, in the order of the texts."""
        return self._whole(self.parts())

    @property
    def measurable_part(self) -> Part:
        """The same, as `measurable` has them."""
        return self._whole(self.measurable())

    def _whole(self, parts: Iterator[Part]) -> Part:
        return joined(parts, len(self.layers), len(self.experts)).by_text()

    @property
    def scalings(self) -> Float[Tensor, "N L E"]:
        """s of each token."""
        return self.part.scalings

    @property
    def weights(self) -> Float[Tensor, "N E"]:
        """Mean of s over the layers: how much of each expert a token got."""
        return self.scalings.mean(1)

    @property
    def leading(self) -> Int[Tensor, " N"]:
        """The expert of the largest weight, by its number; -1 where no expert of a selection has one."""
        return leading_of(self.weights)

    @property
    def tokens(self) -> Int[Tensor, " N"]:
        """Token ids; -1 where the model was given embeddings."""
        return self.part.token

    @property
    def positions(self) -> Int[Tensor, " N"]:
        """The place of each token in its text, from 0."""
        return self.part.position

    @property
    def sequence_numbers(self) -> Int[Tensor, " N"]:
        """The number of each token's text."""
        return self.part.sequence

    @property
    def sequences(self) -> list[int]:
        """The texts that tokens are here of."""
        found = torch.cat([part.sequence.unique() for part in self.parts()] or [torch.zeros(0, dtype=torch.long)])
        return sorted(set(found.tolist()))

    def select(
        self,
        *,
        tokens: Tokens | None = None,
        layers: Picked | None = None,
        experts: Picked | None = None,
        sequences: Picked | None = None,
    ) -> RoutingRecord:
        """Some of it, as a record in memory.

        Args:
            tokens: positions in their texts, as a number, a slice or a list; a pattern of their text as in file names
                (`"*ing"`); or (N,), True for the tokens that stay, as a tensor, an array or a list.
            layers: a number, a name or a pattern (`"*q_proj"`), or a list of such.
            experts: likewise; scalings stay what they are, so that those of a token need not add up to 1 any more.
            sequences: numbers of texts, likewise.

        Raises:
            RoutingError: what nothing matches, no token among them; or layers where all share their scalings.
        """
        which, texts = plain(tokens, mask=True), plain(sequences, names=False)
        masked = is_mask(which)
        if layers is not None and self.shared:
            raise RoutingError(
                "Layers are told apart where each has its own scalings.",
                received=f"layers={layers!r}, and one routing that all {len(self.header.adapted)} layers share",
                remedy="leave layers= out; a mixture with layerwise_scalings=True routes each layer by itself",
            )
        rows_of = None if layers is None else pick("layer", self.layers, plain(layers))
        columns = None if experts is None else pick("expert", self.experts, plain(experts))
        found: list[Part] = []
        for part in [self.part] if masked else self.parts():
            if tokens is not None or sequences is not None:
                pieces = self._texts(part) if isinstance(which, str | list) and not masked else None
                part = part[chosen_rows(part, which, texts, pieces)]
            scalings = part.scalings if rows_of is None else part.scalings[:, rows_of]
            found.append(replace(part, scalings=scalings if columns is None else scalings[:, :, columns]))
        if self.kept and not sum(map(len, found)):
            asked = {"tokens": which if not masked else "a mask that is False everywhere", "sequences": texts}
            raise RoutingError(
                "A selection has at least one token.",
                received=", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None),
                remedy="look at record.sequences, record.positions and record.pieces() for what there is",
            )
        header = self._own_header()
        header.layers = header.layers if rows_of is None else [self.layers[i] for i in rows_of]
        header.experts = header.experts if columns is None else [self.experts[i] for i in columns]
        return self._with(header, found)

    def _own_header(self) -> Header:
        """A selection's, before it has less."""
        return replace(copy.deepcopy(self.header), palette=self.palette, sample=self.is_sample)

    def _with(self, header: Header, parts: list[Part]) -> RoutingRecord:
        header.seen = sum(map(len, parts))
        return RoutingRecord(header, Kept(parts), self.tokenizer, self._pieces)

    def coloured_by(self, names: Sequence[str]) -> RoutingRecord:
        """The same, with the colours that its experts have among these names (`expert_colours`).

        Raises:
            RoutingError: its experts are not all among them, or they have no order.
        """
        missing = [name for name in self.experts if name not in names]
        if missing or isinstance(names, str | Set):
            raise RoutingError(
                "An expert's colour is that of its place among all names.",
                received=f"names without {some(missing)}: {some(list(names))}" if missing else f"{names!r}"[:200],
                remedy="pass all experts of both mixtures, such as [*one.palette, *other.palette]",
            )
        return RoutingRecord(self.header, self.source, self.tokenizer, self._pieces, names)

    def sequence(self, number: SupportsIndex) -> RoutingRecord:
        """A whole text: its own tokens, and before them those that it shares with the text that it forked from.

        Raises:
            RoutingError: no such text.
        """
        whole, wanted = self.part, plain(number, names=False)
        path = path_of(whole, self.header.forks, wanted if isinstance(wanted, int) else -1)
        if not len(path):
            raise RoutingError(
                "A text is named by its number.",
                received=f"text {number!r}; the record has {some(self.sequences)}",
                remedy="pass one of record.sequences",
            )
        part = whole[path]
        header = self._own_header()
        header.forks = {}
        return self._with(header, [replace(part, sequence=torch.full_like(part.sequence, wanted))])

    def following(self, ids: Iterable[SupportsIndex] | Tensor) -> RoutingRecord:
        """The text that reads these tokens, as `generate` returned them: which of its beams, for example.

        Args:
            ids: without padding. The last one need not have been read.

        Raises:
            RoutingError: there is none, the record is a sample, or what is no row of ids.
        """
        wanted = torch.tensor(row_of(ids), dtype=torch.long)
        number = None if self.is_sample else text_of(self.part, self.header.forks, wanted)
        if number is not None:
            return self.sequence(number).select(tokens=slice(0, len(wanted)))
        raise RoutingError(
            "A text is found by all tokens that it begins with.",
            received=f"{len(wanted)} tokens, in {'a sample' if self.is_sample else 'no text of the record'}",
            remedy="pass one row of ids without its padding, and record with a larger max_tokens=, or with spill=",
        )

    def pieces(self) -> list[str]:
        """The text of each token. In each run of tokens they add up to its text: a character of several tokens counts
        with the last of them, and the others are empty. Without a tokenizer, "#id".
        """
        return self._texts(self.part)

    def _texts(self, part: Part) -> list[str]:
        if self.tokenizer is not None:
            return pieces_of(self.tokenizer, part)
        return [self._pieces.get(token, f"#{token}") for token in part.token.tolist()]

    def vocabulary(self) -> dict[int, str]:
        """The text of each token id, on its own."""
        if self.tokenizer is None:
            return dict(self._pieces)
        return one_by_one(self.tokenizer, {id for part in self.parts() for id in part.token.unique().tolist()})

    def metrics(self) -> RoutingMetrics:
        """The numbers of all tokens and layers.

        Raises:
            RoutingError: nothing was recorded.
        """
        return self._measured([slice(None)])[0]

    def metrics_by_layer(self) -> dict[str, RoutingMetrics]:
        """Those of each layer.

        Raises:
            RoutingError: nothing was recorded.
        """
        found = self._measured([slice(i, i + 1) for i in range(len(self.layers))])
        return dict(zip(self.layers, found, strict=True))

    def _measured(self, several: Sequence[slice]) -> list[RoutingMetrics]:
        """The numbers of some layers each, in one reading."""
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
        from loramix.analysis.record.table import to_pandas

        return to_pandas(self)

    def save(self, folder: str | PathLike[str]) -> None:
        """Save as `record.json` and `tokens-00000.safetensors` (`loramix.analysis.record.files` has the format).

        Raises:
            SaveError: the folder could not be written; an earlier record in it is whole.
        """
        from loramix.analysis.record.files import save_record

        save_record(self, Path(folder))

    @staticmethod
    def load(folder: str | PathLike[str], tokenizer: Any = None) -> RoutingRecord:
        """Read a record that `save` or `record_routing(spill=…)` wrote; its tokens stay on disk until asked for.

        Args:
            folder: where it lies.
            tokenizer: of the mixture, for the text of the tokens; without it they have the text of each on its own.

        Raises:
            CheckpointNotFoundError: no record there, or one that was not finished.
            CorruptCheckpointError: files that are not what they should be.
            IncompleteCheckpointError: a file of tokens is missing.
            RoutingError: what is no tokenizer, or one to which the tokens are other text.
        """
        from loramix.analysis.record.files import load_record

        return load_record(Path(folder), tokenizer)
