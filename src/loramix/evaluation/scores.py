"""The loss of the base model, each expert, both mixtures and the oracle on any text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from loramix.errors import DataError
from loramix.evaluation.ablation import LeaveOneOut, without_expert
from loramix.evaluation.losses import text_nats
from loramix.evaluation.passages import Passage
from loramix.model.build import XLoraModel

BASE, UNIFORM, MIXTURE, ORACLE = "base model", "uniform mixture", "X-LoRA", "oracle"
WITHOUT = "without "


@dataclass(frozen=True)
class Score:
    """How well a model predicts some text: Σ −ln p in `nats`, over `tokens` tokens of `bytes` bytes of UTF-8."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def loss(self) -> float:
        """Nats per token; lower is better."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which do not depend on the tokenizer; lower is better."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def total(scores: Iterable[Score]) -> Score:
    """The sum of the scores."""
    return sum(scores, Score())


def measure(
    model: nn.Module, passages: Sequence[Passage], batch: int = 8, *, done: Callable[[int], object] = id
) -> dict[str, Score]:
    """The score of each group of text that occurs in the passages.

    Args:
        model: a causal language model, mixture or not.
        passages: what to predict.
        batch: passages in one forward.
        done: called after each forward, with the number of its passages.
    """
    return by_group(text_nats(model, [passage.ids for passage in passages], batch, done=done), passages)


def by_group(nats: Sequence[Tensor], passages: Sequence[Passage]) -> dict[str, Score]:
    """The scores of passages by group, from −ln p of each of their tokens after the first."""
    scores: defaultdict[str, Score] = defaultdict(Score)
    for row, passage in zip(nats, passages, strict=True):
        for group, size, value in zip(passage.groups, passage.bytes, row.tolist(), strict=True):
            scores[group] += Score(value, 1, size)
    return dict(scores)


@dataclass(frozen=True)
class Evaluation:
    """Scores by row (`BASE`, each expert, `UNIFORM`, `MIXTURE`, `WITHOUT` + each expert), then by group of text.

    Attributes:
        scores: the scores.
        experts: the experts' names.
    """

    scores: dict[str, dict[str, Score]]
    experts: list[str]

    @property
    def groups(self) -> list[str]:
        """The groups of text."""
        return list(self.scores[BASE])

    def best_expert(self, group: str) -> str:
        """The expert that predicts a group best on its own."""
        return min(self.experts, key=lambda expert: self.scores[expert][group].nats)

    def row(self, name: str) -> dict[str, Score]:
        """The scores of one row by group; `ORACLE` takes the best expert of each group."""
        if name == ORACLE:
            return {group: self.scores[self.best_expert(group)][group] for group in self.groups}
        return self.scores[name]

    def leave_one_out(self) -> dict[str, float]:
        """By how many nats a token the mixture's loss rises without each expert; negative where the expert hurts."""
        whole = total(self.scores[MIXTURE].values())
        rows = {expert: self.scores.get(WITHOUT + expert) for expert in self.experts}
        without = {expert: total(row.values()).loss for expert, row in rows.items() if row is not None}
        return LeaveOneOut(whole.loss, without, whole.tokens).differences

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON's types, with the totals over all groups as `all`."""

        def figures(score: Score) -> dict[str, float]:
            return {
                "loss": score.loss,
                "perplexity": score.perplexity,
                "bits_per_byte": score.bits_per_byte,
                "tokens": score.tokens,
                "bytes": score.bytes,
            }

        rows = [BASE, *self.experts, UNIFORM, MIXTURE, ORACLE]
        return {
            "experts": self.experts,
            "best_expert": {group: self.best_expert(group) for group in self.groups},
            "rows": {
                name: {group: figures(score) for group, score in self.row(name).items()}
                | {"all": figures(total(self.row(name).values()))}
                for name in rows
            },
            "leave_one_out": self.leave_one_out(),
        }


def evaluate(
    model: XLoraModel,
    passages: Sequence[Passage],
    *,
    batch: int = 8,
    leave_one_out: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Measure every row on every group of the passages.

    Args:
        model: the mixture.
        passages: the text.
        batch: passages in one forward.
        leave_one_out: also measure the mixture without each expert.
        progress: show a progress bar, where stderr is a terminal.

    Raises:
        DataError: nothing to predict.
    """
    if not any(passage.groups for passage in passages):
        raise DataError(
            "An evaluation needs text of at least two tokens.",
            received=f"{len(passages)} passages without a token to predict",
            remedy="Give longer text.",
        )
    scores: dict[str, dict[str, Score]] = {}
    settings = list(rows(model, leave_one_out=leave_one_out))
    with tqdm(total=len(settings) * len(passages), disable=None if progress else True, leave=False) as bar:
        for row, setting in settings:
            bar.set_description(row)
            with setting:
                scores[row] = measure(model, passages, batch, done=bar.update)
    return Evaluation(scores, model.expert_names)


def rows(model: XLoraModel, *, leave_one_out: bool) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Each row's name, and the context manager in which the model is measured for it."""
    experts = model.expert_names
    yield BASE, model.disable_adapter()
    for chosen in experts:
        yield chosen, model.fixed_scalings([float(name == chosen) for name in experts])
    yield UNIFORM, model.fixed_scalings([1 / len(experts)] * len(experts))
    yield MIXTURE, nullcontext()
    if leave_one_out and len(experts) > 1:
        for expert in experts:
            yield WITHOUT + expert, without_expert(model, expert)


def columns(evaluation: Evaluation, figure: str) -> Mapping[str, dict[str, float]]:
    """One figure of every row, by row and then by group, `all` last.

    Args:
        evaluation: what was measured.
        figure: "loss", "perplexity" or "bits_per_byte".
    """
    content = evaluation.to_dict()["rows"]
    return {row: {group: values[figure] for group, values in by_group.items()} for row, by_group in content.items()}
