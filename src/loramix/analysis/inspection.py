"""Inspecting a mixture on some text: its routing there, and the loss without each expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loramix.analysis.metrics import confidence_of, leaders_of
from loramix.analysis.record.record import RoutingRecord
from loramix.analysis.record.recorder import MAX_TOKENS, record_routing
from loramix.config.checks import require_integer
from loramix.errors import DataError, RoutingError
from loramix.evaluation.ablation import LeaveOneOut, leave_one_out
from loramix.evaluation.passages import pad, start_of, window_size, windows
from loramix.experts.base_layers import device_of
from loramix.experts.base_model import positions_of
from loramix.experts.selection import listed
from loramix.model.build import XLoraModel
from loramix.passes.state import evaluating

_AT_ONCE = 2048  # tokens of a forward, padding included


@dataclass(frozen=True)
class Inspection:
    """The routing of some text, for displays to show.

    Attributes:
        record: the routing.
        title: the name of what was inspected.
        names: the name of each text, by its number in the record; a text without one is called by its number.
        notes: what was cut or left out, a sentence each.
        leave_one_out: the losses without each expert, where they were measured.
    """

    record: RoutingRecord
    title: str = "Routing"
    names: Sequence[str] = ()
    notes: Sequence[str] = ()
    leave_one_out: LeaveOneOut | None = None

    def __post_init__(self) -> None:
        if (
            self.leave_one_out is not None
            and len(self.record.palette) > 1
            and set(self.leave_one_out.without) != set(self.record.palette)
        ):
            raise RoutingError(
                "The losses without each expert are measured with the mixture of the record.",
                received=f"a record of {listed(self.record.palette)}, losses without "
                + listed(list(self.leave_one_out.without)),
                remedy="record and measure the same mixture; inspect_texts(…, leave_out=True) does both",
            )

    @property
    def differences(self) -> dict[str, float]:
        """By how much the loss rises without each expert; empty where it was not measured, or with one expert."""
        found = {} if self.leave_one_out is None else self.leave_one_out.differences
        return {name: found[name] for name in self.record.experts if name in found}

    def name_of(self, sequence: int) -> str:
        """The name of a text."""
        kind = "encoder's text" if sequence in self.record.header.encoder_texts else "text"
        return self.names[sequence] if sequence < len(self.names) else f"{kind} {sequence}"

    @property
    def all_notes(self) -> list[str]:
        """What the record holds, what is missing, and what to know about the mixture, a sentence each."""
        record, found = self.record, [self.record.note, *self.notes]
        if len(record.palette) == 1:
            found.append("One expert alone: there is nothing to route between, and nothing to leave out.")
        elif record.shared:
            found.append(f"The {len(record.header.adapted)} adapted layers share one routing: no layer differs.")
        if any(bool((part.scalings < 0).any()) for part in record.parts()):
            found.append("Some scalings are negative: confidence, entropies and effective experts are of the others.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON's types: the metrics, and each recorded token with its weights, means over the layers."""
        record, losses = self.record, self.leave_one_out
        part, metrics = record.part, record.metrics()
        weights = part.scalings.mean(1)
        number = {sequence: i for i, sequence in enumerate(record.sequences)}
        columns: dict[str, list[Any]] = {
            "text": [number[sequence] for sequence in part.sequence.tolist()],
            "position": part.position.tolist(),
            "id": part.token.tolist(),
            "token": record.pieces(),
            "leader": leaders_of(record.experts, weights),
            "confidence": _rounded(confidence_of(weights)),
            "weights": _rounded(weights),
        }
        return {
            "mixture": self.title,
            "experts": record.experts,
            "layers": record.header.adapted if record.shared else record.layers,
            "shared_by_all_layers": record.shared,
            "notes": self.all_notes,
            "texts": [self.name_of(number) for number in record.sequences],
            "load": dict(zip(record.experts, metrics.load, strict=True)),
            "importance": dict(zip(record.experts, metrics.importance, strict=True)),
            "metrics": metrics.scalars(),
            "leave_one_out": None
            if losses is None
            else {
                "loss": losses.loss,
                "tokens": losses.tokens,
                "differences": self.differences,
                "standard_errors": {name: losses.errors[name] for name in self.differences if losses.errors},
            },
            "tokens": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        }


def _rounded(values: torch.Tensor) -> list[Any]:
    return values.double().mul(1e5).round().div(1e5).tolist()


@torch.no_grad()
def inspect_texts(
    model: XLoraModel,
    tokenizer: Any,
    texts: Iterable[tuple[str, str]],
    *,
    title: str = "Routing",
    leave_out: bool = False,
    window: int | None = None,
    limit: int = MAX_TOKENS,
) -> Inspection:
    """Let a mixture read some texts, and record its routing.

    A text that is longer than a window is read in pieces, each on its own, with the start token in front where the
    tokenizer has one. The notes say what was cut and what was not read.

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        texts: name and text of each.
        title: the name of what is inspected.
        leave_out: also measure the loss without each expert, with one more pass over the text for each.
        window: tokens of a piece; None takes as many as the base model has positions, at most 1024.
        limit: the most tokens to read, start tokens included.

    Raises:
        DataError: no text has a token, a text has no name, or the window is longer than the base model's positions.
        ConfigurationError: a limit or a window that is not a number.
        RoutingError: scalings that are not finite; and as `record_routing`.
    """
    require_integer("limit", limit, at_least=1, remedy=f"Pass for example limit={MAX_TOKENS}.")
    size = window_size(model.config, window)
    pieces, notes = _cut(tokenizer, texts, size, limit, whole=size == positions_of(model.config))
    ids = [ids for _, ids in pieces]
    with record_routing(model, tokenizer, max_tokens=max(1, sum(map(len, ids)))) as record:
        _read(model, ids, size)
    record.require_measurable()
    losses = None
    if leave_out and len(record.experts) > 1:
        if any(len(text) > 1 for text in ids):
            losses = leave_one_out(model, ids, batch=max(1, _AT_ONCE // size))
        else:
            notes.append("The loss without each expert was not measured: no text has two tokens.")
    return Inspection(record, title, [name for name, _ in pieces], notes, losses)


def _cut(
    tokenizer: Any, texts: Iterable[tuple[str, str]], size: int, limit: int, *, whole: bool
) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """Texts as named pieces of at most `size` tokens, up to the limit, and the notes about them."""
    start, found = start_of(tokenizer), list[tuple[str, list[int]]]()
    read = total = long = 0
    for one in texts:
        name, text = _named(one)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = list(windows(ids, size, start=start))
        total += len(ids)
        long += len(pieces) > 1
        for first, whole_piece in pieces:
            piece = whole_piece[: max(0, limit - read)]
            if len(piece) > len(start):
                where = f", tokens {first} to {first + len(piece) - len(start) - 1}" if len(pieces) > 1 else ""
                found.append((name + where, piece))
                read += len(piece)
    if not found:
        raise DataError(
            "A text to look at has at least one token.",
            received="nothing but empty text" if not total else f"a limit of {limit} tokens",
            remedy="give a longer text" if not total else "read more tokens",
        )
    notes: list[str] = []
    if long:
        most = "the base model has positions for" if whole else "are read at once"
        texts_are = "One text is" if long == 1 else f"{long} texts are"
        notes.append(
            f"{texts_are} longer than the {size} tokens that {most}: read in pieces, each from its own beginning."
        )
    kept = read - len(start) * len(found)
    if kept < total:
        notes.append(f"Read: the first {kept} of {total} tokens; the rest is beyond the limit of {limit}.")
    return found, notes


def _named(one: Any) -> tuple[str, str]:
    pair: tuple[Any, ...] = tuple(one) if isinstance(one, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise DataError(
            "A text to look at comes with its name.", received=f"{one!r}"[:200], remedy='pass pairs: [("notes", text)]'
        )
    return pair


def _read(model: XLoraModel, texts: Sequence[list[int]], size: int) -> None:
    device = device_of(model)
    batch = max(1, _AT_ONCE // size)
    with evaluating(model):
        for i in range(0, len(texts), batch):
            ids, real = (tensor.to(device) for tensor in pad(texts[i : i + batch]))
            model(input_ids=ids, attention_mask=real, use_cache=False)
