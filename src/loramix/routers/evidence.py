"""A router that gathers evidence: what the tokens so far say of which expert the text belongs to.

B, S: batch, sequence. H: hidden size. L: adapted layers. E: experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError
from loramix.routers.gating import Gating, gating_of
from loramix.routers.router import RouterSizes, Shapes, TextRouter, register_router
from loramix.routers.start import ClosedForm, LinearRouter, Method, Moments


@register_router
class EvidenceRouter(TextRouter):
    """z_t = a + y_t,  y_t = λ y_{t−1} + W x_t + b,  y_0 = 0

    x_t is the embedding of token t as it enters the base model, divided by its rms. W x + b is what one token says, by
    itself, of the text's expert: the logarithm of p(x | expert), up to a constant. If a text's tokens were independent,
    their sum would give the posterior over experts (naive Bayes). λ < 1 forgets, since a text can change its subject
    and its tokens are not independent. The hidden states of a first pass know the context, so that each repeats what
    the ones before have said, and their sum counts it many times; embeddings do not.

    W and b are a logistic regression onto labels (`init_router`), distilled, or trained, and λ with them. Built, it is
    the uniform mixture: W = 0, b = 0, and a of `Gating.uniform`.

    Args:
        hidden_size: H, which is the width of the embeddings.
        distinct: 1, or L with `layerwise_scalings`.
        experts: E.
        start: every entry of a.

    Attributes:
        weight: (E, H), or (L · E, H): W.
        bias: (E,), or (L · E,): b.
        prior: (E,), or (L · E,): a, what is known before the text.
        distinct_layers: 1, or L.
        memory: (1,): ln(λ / (1 − λ)).

    Source: loramix's own; naive Bayes with exponential forgetting, as in adaptive filters.
    """

    kind = "evidence"

    def __init__(self, hidden_size: int, distinct: int, experts: int, start: float) -> None:
        super().__init__()
        self.distinct_layers = distinct
        self.weight = nn.Parameter(torch.zeros(distinct * experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(distinct * experts))
        self.prior = nn.Parameter(torch.full((distinct * experts,), start))
        self.memory = nn.Parameter(torch.full((1,), math.log(_KEPT / (1 - _KEPT))))

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        distinct = sizes.layers if config.layerwise_scalings else 1
        return cls(sizes.hidden_size, distinct, sizes.experts, gating_of(config).uniform(sizes.experts))

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        rows = sizes.experts * (sizes.layers if config.layerwise_scalings else 1)
        return {"weight": (rows, sizes.hidden_size), "bias": (rows,), "prior": (rows,), "memory": (1,)}

    @classmethod
    def check(cls, config: XLoraConfig) -> None:
        super().check(config)
        if not gating_of(config).normalised:
            raise ConfigurationError(
                "Evidence adds up over a text, and a softmax makes scalings of it.",
                received=f"enable_softmax=False for router={cls.kind!r}",
                remedy="leave enable_softmax out",
            )

    @classmethod
    def check_start(cls, config: XLoraConfig, experts: int, method: Method) -> None:
        pass

    @torch.no_grad()
    def start_uniform(self, gating: Gating) -> None:
        self.weight.zero_()
        self.bias.zero_()
        self.prior.fill_(gating.uniform(len(self.prior) // self.distinct_layers))

    @torch.no_grad()
    def start_from(self, moments: Sequence[Moments], method: ClosedForm, gating: Gating) -> LinearRouter:
        """Logistic regression onto the experts, whatever the method: its logits are what naive Bayes adds up."""
        found = moments[0].fit_logistic(gating)
        self.start_uniform(gating)
        self.weight.copy_((found.scale * found.weight).repeat(self.distinct_layers, 1))
        self.bias.copy_((found.scale * found.bias).repeat(self.distinct_layers))
        return found

    @classmethod
    def cold_expert(
        cls,
        config: XLoraConfig,
        columns: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        share: float,
        offset: float,
    ) -> dict[str, Tensor]:
        new = {name: share * columns[name].mean(-1) for name in ("weight", "bias", "prior")}
        return new | {"prior": new["prior"] + offset}

    def read(
        self,
        embeddings: Float[Tensor, "B S H"],
        real: Bool[Tensor, "B S"],
        first: Bool[Tensor, "B S"],
        before: Float[Tensor, "B distinct_E"] | None,
    ) -> Float[Tensor, "B S distinct_E"]:
        if embeddings.shape[-1] != self.weight.shape[-1]:
            raise ConfigurationError(
                "A router of evidence reads embeddings of the width that it was made for.",
                received=f"embeddings {tuple(embeddings.shape)} for weights {tuple(self.weight.shape)}",
                remedy=f"use the base model whose embeddings have the width {self.weight.shape[-1]}",
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            said = F.linear(embeddings, self.weight, self.bias)
            return accumulated(said, F.logsigmoid(self.memory), real, first, before)

    def distinct(self, read: Float[Tensor, "B S distinct_E"]) -> Float[Tensor, "B S distinct E"]:
        return (self.prior + read).unflatten(-1, (self.distinct_layers, -1))


def accumulated(
    values: Float[Tensor, "B S E"],
    log_decay: Float[Tensor, 1],
    real: Bool[Tensor, "B S"],
    first: Bool[Tensor, "B S"],
    before: Float[Tensor, "B E"] | None,
) -> Float[Tensor, "B S E"]:
    """z_t = λ z_{t−1} + values_t at real tokens, z_t = z_{t−1} at padding; z before a first token is 0.

    In blocks of tokens: inside each one, and between the blocks, a product with powers of λ, so that no loop runs over
    the tokens.

    Args:
        values: what is added.
        log_decay: ln λ, at most 0.
        real: False at padding.
        first: where to begin anew.
        before: z before the first of these tokens; None for 0.
    """
    batch, length, experts = values.shape
    values = values * real.unsqueeze(-1)
    before = values.new_zeros(batch, experts) if before is None else before.to(values)
    if length == 1:
        kept = torch.exp(log_decay * real) * ~first
        return values + (kept * before).unsqueeze(1)
    size = min(_BLOCK, length)
    padding = -length % size
    values = F.pad(values, (0, 0, 0, padding)).unflatten(1, (-1, size))
    age = F.pad(real.to(values.dtype), (0, padding)).cumsum(1).unflatten(1, (-1, size))  # real tokens so far
    text = F.pad(first.long(), (0, padding)).cumsum(1).unflatten(1, (-1, size))
    inside = _powers(log_decay, age, text, age, text) @ values
    ends = torch.cat([before.unsqueeze(1), inside[:, :, -1]], 1)
    end_age, end_text = F.pad(age[:, :, -1], (1, 0)), F.pad(text[:, :, -1], (1, 0))
    carried = _powers(log_decay, end_age, end_text, end_age, end_text) @ ends
    late = _powers(log_decay, age, text, end_age[:, :-1, None], end_text[:, :-1, None], causal=False)
    found = inside + late * carried[:, :-1].unsqueeze(2)
    return found.flatten(1, 2)[:, :length]


def _powers(
    log_decay: Tensor, age: Tensor, text: Tensor, other: Tensor, its_text: Tensor, *, causal: bool = True
) -> Float[Tensor, "*blocks n m"]:
    """λ^(age_i − other_j) where i is not before j and of the same text; elsewhere 0."""
    gap = age.unsqueeze(-1) - other.unsqueeze(-2)
    same = text.unsqueeze(-1) == its_text.unsqueeze(-2)
    if causal:
        same = same.tril()
    return torch.exp(log_decay * gap.clamp_min(0.0)) * same


_KEPT = 0.9
"""λ at the start: a token counts half after 6.6 tokens. Chosen on the mixtures of `benchmarks.routers`."""
_BLOCK = 64
