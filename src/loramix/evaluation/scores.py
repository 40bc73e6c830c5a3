"""What a mixture is worth: the loss of the base model, each expert, both mixtures and the oracle on any text.

B: batch. S: tokens of a passage, the first of which is given, not predicted. V: vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from loramix.errors import DataError
from loramix.evaluation.ablation import pad, token_nats, without_expert
from loramix.model.build import XLoraModel

BASE, UNIFORM, MIXTURE, ORACLE = "base model", "uniform mixture", "X-LoRA", "oracle"
WITHOUT = "without "


@dataclass(frozen=True)
class Score:
    """How well a model predicts some text: `nats` of information for `tokens` tokens, `bytes` bytes of UTF-8."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def loss(self) -> float:
        """Nats for a token; lower is better."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits for a byte of text: comparable between tokenizers; lower is better."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass(frozen=True)
class Passage:
    """A piece of text as tokens.

    Attributes:
        ids: S tokens.
        groups: for each token but the first, the group of text that it belongs to.
        bytes: for each token but the first, how many bytes of text it adds.
    """

    ids: list[int]
    groups: list[str]
    bytes: list[int]


def total(scores: Iterable[Score]) -> Score:
    """The sum of the scores."""
    return sum(scores, Score())


@torch.no_grad()
def measure(
    model: nn.Module, passages: Sequence[Passage], batch: int = 8, *, done: Callable[[int], object] = id
) -> dict[str, Score]:
    """The score of each group of text that occurs in the passages.

    Args:
        model: a causal language model, mixture or not.
        passages: what to predict; padding on the right does not change what a causal model makes of them.
        batch: passages in one forward.
        done: called after each forward, with the number of its passages.
    """
    device = next(model.parameters()).device
    scores: defaultdict[str, Score] = defaultdict(Score)
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(passages), batch):
            chosen = passages[i : i + batch]
            ids, real = (tensor.to(device) for tensor in pad([passage.ids for passage in chosen]))
            nats = token_nats(model(input_ids=ids, attention_mask=real, use_cache=False).logits, ids)
            for row, passage in zip(nats.tolist(), chosen, strict=True):
                for group, size, value in zip(passage.groups, passage.bytes, row, strict=False):
                    scores[group] += Score(value, 1, size)
            done(len(chosen))
    finally:
        model.train(was_training)
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
        """For each expert, by how many nats a token the mixture's loss rises without it; negative where it hurts."""
        whole = total(self.scores[MIXTURE].values()).loss
        rows = {expert: self.scores.get(WITHOUT + expert) for expert in self.experts}
        return {expert: total(row.values()).loss - whole for expert, row in rows.items() if row is not None}

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
    """Each row's name, and what to open around the model to measure it."""
    experts = model.expert_names
    yield BASE, model.disable_adapter()
    for chosen in experts:
        yield chosen, model.fixed_scalings([float(name == chosen) for name in experts])
    yield UNIFORM, model.fixed_scalings([1 / len(experts)] * len(experts))
    yield MIXTURE, nullcontext()
    if leave_one_out and len(experts) > 1:
        for expert in experts:
            yield WITHOUT + expert, without_expert(model, expert)


def cut(
    tokenizer: Any, texts: Iterable[tuple[str, str]], *, window: int, least: int = 2, limit: int | None = None
) -> list[Passage]:
    """Texts cut into passages of at most `window` tokens, each with the start token in front where there is one.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: text and its group.
        window: tokens of a passage, the start token included.
        least: a shorter rest is left out.
        limit: at most so many passages of each group.

    Raises:
        DataError: a tokenizer that does not know where its tokens lie in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "Bits per byte need a tokenizer that tells which bytes a token stands for.",
            received=f"a {type(tokenizer).__name__}, which is not a fast one",
            remedy="Save a tokenizer.json with AutoTokenizer.from_pretrained(…).save_pretrained(…), and use that.",
        )
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = window - len(start)
    found: list[Passage] = []
    counts: defaultdict[str, int] = defaultdict(int)
    for text, group in texts:
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids, sizes = list(encoding.ids), _sizes(text, encoding.offsets)
        for i in range(0, len(ids), size):
            piece = start + ids[i : i + size]
            if len(piece) < max(2, least) or (limit is not None and counts[group] >= limit):
                continue
            lengths = sizes[i : i + size]
            found.append(Passage(piece, [group] * (len(piece) - 1), lengths if start else lengths[1:]))
            counts[group] += 1
    return found


def _sizes(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The bytes that each token adds; a character of several tokens counts with the first that reaches its end."""
    sizes: list[int] = []
    reached = 0
    for _, end in offsets:
        sizes.append(len(text[reached:end].encode()) if end > reached else 0)
        reached = max(reached, end)
    return sizes


def columns(evaluation: Evaluation, figure: str) -> Mapping[str, dict[str, float]]:
    """One figure of every row, by row and then by group, `all` last.

    Args:
        evaluation: what was measured.
        figure: "loss", "perplexity" or "bits_per_byte".
    """
    content = evaluation.to_dict()["rows"]
    return {row: {group: values[figure] for group, values in by_group.items()} for row, by_group in content.items()}
