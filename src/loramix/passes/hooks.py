"""Hooks: how training and recording take part in the passes of a mixture. The passes do not depend on either.

B, S: batch, sequence. H: hidden size. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.routers.gating import Gating

EXPERT_IDS = "expert_ids"
"""The argument of a mixture's forward that says which expert a text belongs to: (B,) or (B, S), -1 where unknown."""


@dataclass(frozen=True)
class RouterOutput:
    """What the router and the gating made in one forward.

    Attributes:
        logits: z, with gradients in training.
        activated: after the softmax, before top-k (docs/semantics.md §2, step 1).
        final: s, the scalings that the layers apply.
        inputs: the arguments of the backbone's forward by name, `expert_ids` among them where they were given.
        training: whether the model is in training mode.
        gating: what made the scalings of the logits.
        of_encoder: whether the tokens are those of an encoder that stands before a decoder.
    """

    logits: Float[Tensor, "B S L E"]
    activated: Float[Tensor, "B S L E"]
    final: Float[Tensor, "B S L E"]
    inputs: Mapping[str, Any]
    training: bool
    gating: Gating
    of_encoder: bool = False


class RoutingHook:
    """Takes part in every forward that makes scalings; `attach` puts one on a model.

    The methods are called in this order, for an encoder and for its decoder each. With a layer router there is no
    scaling pass, so no `recall` and `keep`; `logits` is called for each layer. These methods change nothing; a subclass
    overrides those that it needs.

    Attributes:
        unrecorded: whether routing records leave out the forwards in which it takes part, such as those of an ablation.
    """

    unrecorded = False

    def recall(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The scaling pass's last hidden states (B, S, H), if they are known without running it."""

    def keep(self, inputs: Mapping[str, Any], hidden: Float[Tensor, "B S H"]) -> None:
        """The scaling pass ran with these arguments, and these hidden states came out."""

    def logits(self, logits: Float[Tensor, "*tokens L E"], training: bool) -> Float[Tensor, "*tokens L E"]:
        """The logits to route by; of a layer router, those of one layer, without a token dimension if it reads none."""
        return logits

    def given(self, scalings: Float[Tensor, "1 E"]) -> Float[Tensor, "1 E"]:
        """The scalings of a layer that is given them (`XLoraConfig.elsewhere`): the router makes no logits for it."""
        return scalings

    def routed(self, output: RouterOutput) -> Tensor | None:
        """Called with the scalings. A scalar that is returned is a loss: its gradient is added to the model's own."""

    def cached(self, cache: Any) -> None:
        """Called with the cache that this thread's last forward made because it was given none; it holds its tokens."""


def between_graphs(hook: RoutingHook) -> None:
    """Let a compiled model call the hook's `routed` between its graphs: what it does cannot be compiled."""
    vars(hook)["routed"] = torch.compiler.disable(hook.routed)


class CacheFollower:
    """Is told how the rows of a cache change, to know which earlier row each row of a forward continues.

    It is one of the cache's `followers`. A deep copy of the cache has a deep copy of it; it is not pickled.
    """

    def reordered(self, rows: Tensor) -> None:
        """Row i is now what row `rows[i]` was; if `rows` is a mask, the rows with True were kept."""

    def repeated(self, times: int) -> None:
        """Each row was repeated so many times, the copies next to each other."""

    def cropped(self, tokens: int) -> None:
        """So many slots were removed at the end."""

    def emptied(self) -> None:
        """All slots were removed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheFollower, ()


def join_gradient(hidden: Float[Tensor, "B S H"], loss: Float[Tensor, ""]) -> Float[Tensor, "B S H"]:
    """`hidden` as it is, and in backward a gradient of 1 for the loss.

    So an auxiliary loss works with any trainer, whatever loss it computes (docs/architecture.md, decision 8).
    """
    return cast("Tensor", _JoinGradient.apply(hidden, loss))


def join_losses(out: Any, losses: Sequence[Tensor]) -> None:
    """Add the gradients of hooks' losses at a backbone's output, which is changed in place."""
    if losses and torch.is_grad_enabled():
        out.last_hidden_state = join_gradient(out.last_hidden_state, torch.stack(list(losses)).sum())


class _JoinGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dtype, device = ctx.like
        return gradients[0], torch.ones((), dtype=dtype, device=device)


class _Given(threading.local):
    def __init__(self) -> None:
        self.expert_ids: Tensor | None = None


_given = _Given()


def given_expert_ids() -> Tensor | None:
    """The `expert_ids` of this thread's forward, for a backbone that is called without them."""
    return _given.expert_ids


def takes_expert_ids(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward with `expert_ids` among its arguments, so that trainers keep that column of their data."""
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter(EXPERT_IDS, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    end = len(parameters) - bool(parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)

    @functools.wraps(forward)
    def run(self: Any, *args: Any, expert_ids: Tensor | None = None, **kwargs: Any) -> Any:
        outer, _given.expert_ids = _given.expert_ids, expert_ids
        try:
            return forward(self, *args, **kwargs)
        finally:
            _given.expert_ids = outer

    cast(Any, run).__signature__ = signature.replace(parameters=[*parameters[:end], extra, *parameters[end:]])
    return run
