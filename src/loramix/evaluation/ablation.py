"""Leave-one-out: by how much the loss rises when the router cannot choose an expert.

N: predicted tokens. E: experts.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loramix.config.checks import require_integer
from loramix.errors import DataError, RoutingError
from loramix.evaluation.losses import text_nats
from loramix.experts.base_model import positions_of
from loramix.experts.selection import as_python, select
from loramix.model.build import XLoraModel
from loramix.passes.hooks import RoutingHook
from loramix.passes.state import MixtureState, attach, require_routing, state_of


@dataclass(frozen=True)
class LeaveOneOut:
    """Losses in nats a token, with all experts and without each.

    Attributes:
        loss: the mixture's.
        without: the loss by the expert that the router could not choose.
        tokens: the number of predicted tokens, N.
        errors: the standard error of each difference, as if tokens were independent; empty where it was not measured.
    """

    loss: float
    without: dict[str, float]
    tokens: int
    errors: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def differences(self) -> dict[str, float]:
        """By how much the loss rises without each expert; negative where the expert hurts."""
        return {expert: loss - self.loss for expert, loss in self.without.items()}

    def verdict(self, expert: str) -> str:
        """Whether the expert "helps" or "hurts"; "unclear" where the difference is within two standard errors."""
        difference = self.differences[expert]
        if abs(difference) <= 2 * self.errors.get(expert, 0.0):
            return "unclear"
        return "hurts" if difference < 0 else "helps"


@torch.no_grad()
def leave_one_out(model: Any, texts: Sequence[Any], *, batch: int = 8) -> LeaveOneOut:
    """The mixture's loss on some texts, and without each expert in turn.

        difference_e = (1 / N) Σ_t d_te,  d_te = ln p(t) − ln p without e (t);  its standard error √(var_t(d_te) / N)

    Args:
        model: the mixture, a causal language model. With one expert there is nothing to leave out.
        texts: the token ids of each, as a list or a tensor; the first token of a text is given, not predicted.
        batch: texts in one forward.

    Raises:
        DataError: invalid token ids, no token to predict, a text longer than the base model's positions, or a loss that
            is not finite.
        ConfigurationError: `batch` is not a whole number of at least 1.
        UnsupportedOperationError: a model without a router.
        RoutingError: a mixture that makes no scalings, or whose gating gives every expert a weight.
    """
    require_routing(model)
    require_integer("batch", batch, at_least=1, remedy="Pass for example batch=8.")
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    chosen = [ids for text in texts if len(ids := _ids(text, vocabulary)) > 1]
    if not chosen:
        raise DataError(
            "A loss needs a text of at least two tokens.",
            received=f"{len(texts)} texts, none of them so long",
            remedy="Give longer text.",
        )
    longest, most = max(map(len, chosen)), positions_of(model.config)
    if most is not None and longest > most:
        raise DataError(
            "A text is no longer than the base model has positions.",
            received=f"{longest} tokens with {most} positions",
            remedy="cut it into pieces, as inspect_texts(…, leave_out=True) does",
        )
    names = model.expert_names if len(model.expert_names) > 1 else []
    with_all = _nats(model, chosen, None, batch)
    loss, without, errors = float(with_all.mean()), dict[str, float](), dict[str, float]()
    for name in names:
        found = _nats(model, chosen, name, batch)
        without[name] = float(found.mean())
        errors[name] = float((found - with_all).var(correction=0).div(len(found)).sqrt())
    if not all(map(math.isfinite, (loss, *without.values()))):
        raise DataError(
            "A loss is a number.",
            received=f"{loss} with all experts, " + ", ".join(f"{value} without {n}" for n, value in without.items()),
            remedy="look for nan or inf in the weights of the base model, the experts and the router",
        )
    return LeaveOneOut(loss, without, len(with_all), errors)


def _ids(text: Any, vocabulary: int) -> list[int]:
    found = as_python(text)
    ids = list(cast("Sequence[Any]", found)) if isinstance(found, list | tuple) else None
    whole = ids is not None and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
    if ids is None or not whole or not all(0 <= one < vocabulary for one in ids):
        raise DataError(
            "A text is a list of token ids of the base model.",
            received=f"{text!r}"[:200],
            remedy=f"pass the input_ids of its tokenizer for each text: whole numbers below {vocabulary}",
        )
    return ids


def _nats(model: XLoraModel, texts: Sequence[list[int]], without: str | None, batch: int) -> Float[Tensor, " N"]:
    """−ln p of each predicted token."""
    with nullcontext() if without is None else without_expert(model, without, recorded=False):
        return torch.cat(text_nats(model, texts, batch)).double()


@contextmanager
def without_expert(model: XLoraModel, expert: str, *, recorded: bool = True) -> Generator[None]:
    """Inside, the router cannot choose an expert; the softmax divides its weight among the others.

    Args:
        model: the mixture.
        expert: the name of the expert.
        recorded: whether routing records include these forwards.

    Raises:
        RoutingError: no such expert, or a softmax of a softmax, which gives each expert a weight whatever its logit.
    """
    place = select("expert", model.expert_names, expert)[0]
    if not can_leave_out(model):
        raise RoutingError(
            "An expert can be left out where the router can give it no weight.",
            received=f"{state_of(model).gating} with {len(model.expert_names)} experts",
            remedy="with enable_softmax and enable_softmax_topk, set one of the two to False, as is better anyway, or "
            "top_k_lora below the number of experts",
        )
    detach = attach(model, _ExpertLeftOut(state_of(model), place, not recorded))
    try:
        yield
    finally:
        detach()


def can_leave_out(model: XLoraModel) -> bool:
    """Whether an expert can be left out: not where a softmax of a softmax gives every expert a weight."""
    return state_of(model).gating.exclusion(len(model.expert_names)) is not None


class _ExpertLeftOut(RoutingHook):
    def __init__(self, state: MixtureState, expert: int, unrecorded: bool) -> None:
        self.state = state
        self.expert = expert
        self.unrecorded = unrecorded

    def logits(self, logits: Tensor, training: bool) -> Tensor:
        value = self.state.gating.exclusion(logits.shape[-1])
        if value is None:
            raise RoutingError(
                "An expert can be left out where the router can give it no weight.",
                received=f"{self.state.gating}, since a setting was changed",
                remedy="do not change the gating while an expert is left out",
            )
        return logits.index_fill(-1, torch.tensor([self.expert], device=logits.device), value)

    def given(self, scalings: Tensor) -> Tensor:
        return scalings.index_fill(-1, torch.tensor([self.expert]), 0.0)
