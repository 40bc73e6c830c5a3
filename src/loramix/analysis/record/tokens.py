"""The tokens of a record, read as tensors, as text and as metrics.

N: tokens. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loramix.analysis.metrics import RoutingMeter, RoutingMetrics, leading_of
from loramix.analysis.record.header import Header
from loramix.analysis.record.part import Part, joined
from loramix.analysis.record.stores import Source
from loramix.analysis.record.token_text import pieces_of, require_tokenizer, token_texts
from loramix.errors import RoutingError
from loramix.files.tensors import all_finite


class RecordedTokens:
    """Tokens with their final scalings, and what is read from them: tensors, text, metrics.

    Attributes:
        header: what is the same for all tokens.
        source: where the tokens are read from.
        tokenizer: for the tokens' text; None if it is not known.

    Raises:
        RoutingError: `tokenizer` is not a tokenizer.
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
        return self.header.settings.get("top_k")

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
