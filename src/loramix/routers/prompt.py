"""Weights over the experts that a text gives, once for all of its tokens.

B: texts. E: experts. N: features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loramix.errors import RoutingError
from loramix.routers.gating import largest

Signal = Literal["norm", "entropy"]
"""What tells that an expert answers: the length of its answer, or how unevenly it lies over the features."""


def response_weights(
    answers: Float[Tensor, "B E N"], signal: Signal = "norm", top_k: int | None = None
) -> Float[Tensor, "B E"]:
    """w_e = s_e / Σ s over the `top_k` largest signals, 0 for the other experts.

        norm       s_e = ‖o_e‖
        entropy    s_e = 1 / entropy(softmax(o_e))

    An expert whose answer is 0 has the signal 0.

    Args:
        answers: o_e, what each expert adds.
        signal: which of the two.
        top_k: experts that count; None counts all.

    Raises:
        RoutingError: a text that no expert answers.

    Source: LoGo, Lee et al., arXiv 2511.07129, section 3.
    """
    answers = answers.float()
    silent = (answers == 0).all(-1)
    if bool(silent.all(-1).any()):
        raise RoutingError(
            "Weights follow from what the experts add to a text.",
            received=f"text {int(silent.all(-1).nonzero()[0])}, to which no expert adds anything",
            remedy="look at other modules, which the experts adapt",
        )
    if signal == "norm":
        signals = answers.norm(dim=-1)
    else:
        logs = answers.log_softmax(-1)
        signals = 1 / -(logs.exp() * logs).sum(-1).clamp_max(-_LEAST)
    signals = signals.masked_fill(silent, 0.0)
    if top_k is not None:
        signals = signals.masked_fill(~largest(signals, top_k), 0.0)
    return signals / signals.sum(-1, keepdim=True)


def similarity_weights(
    text: Float[Tensor, "B N"], examples: Float[Tensor, "E N"], temperature: float
) -> Float[Tensor, "B E"]:
    """w = softmax(cos(text, examples_e) / temperature) over the experts."""
    cosines = F.cosine_similarity(text.float().unsqueeze(1), examples.float(), dim=-1)
    return torch.softmax(cosines / temperature, dim=-1)


_LEAST = 1e-6
"""Nats: a smaller entropy counts as this one."""
