"""How often drafts are right, estimated from those that were verified and from those that were only compared.

A comparison costs no forward. The drafts of prompt lookup are known for every token. Whether the scaling pass would
have drafted the chosen token follows from its hidden states, which sequential decoding computes anyway: the token's
logit must be the largest. To rule that out, the logits of a few tokens suffice. This saves the product with the whole
head, which may be the largest matrix of the model.

B: batch. H: hidden size. V: vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

SCALING_PASS, TEXT = "scaling pass", "text"  # drafters: where drafts come from

RECENT = 24  # drafts that an estimate is made of
ENOUGH = 3  # drafts without which there is no estimate, unless an earlier generation gave one
PRIOR = 2  # drafts that an earlier generation's estimate counts as
SHORTLIST = 32  # tokens, the mixture's most probable ones


def _recent() -> deque[bool]:
    return deque(maxlen=RECENT)


@dataclass
class Acceptance:
    """The acceptance of one drafter's drafts in one generation.

    Attributes:
        prior: the estimate at the end of an earlier generation; None where there was none.
        right: drafts that were right so far.
        recent: the latest drafts, True where they were right in every row.
    """

    prior: float | None = None
    right: int = 0
    recent: deque[bool] = field(default_factory=_recent)

    def add(self, right: bool) -> None:
        """Count one draft."""
        self.recent.append(right)
        self.right += right

    @property
    def rate(self) -> float | None:
        """The probability that the next draft is right; None while too little is known."""
        count, right = len(self.recent), sum(self.recent)
        if self.prior is not None:
            return (right + PRIOR * self.prior) / (count + PRIOR)
        return (right + 0.5) / (count + 1) if count >= ENOUGH else None


def would_draft(
    head: nn.Linear, hidden: Float[Tensor, "B H"], logits: Float[Tensor, "B V"], chosen: Int[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Whether the scaling pass would have drafted the token that was chosen, judged by a shortlist.

    Args:
        head: the language model's head.
        hidden: the scaling pass's last hidden states.
        logits: the mixture pass's, which choose the shortlist.
        chosen: the token that followed.

    Returns:
        False is certain; True is wrong if a token outside the shortlist has the largest logit.
    """
    rivals = logits.topk(min(SHORTLIST, logits.shape[-1])).indices
    tokens = torch.cat([chosen[:, None], rivals], 1)
    scores = (head.weight[tokens] @ hidden[..., None])[..., 0]
    bias: Any = head.bias  # None without one, whatever its type says
    if bias is not None:
        scores = scores + bias[tokens]
    return tokens.gather(1, scores.argmax(-1, keepdim=True))[:, 0] == chosen
