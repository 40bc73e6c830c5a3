"""From the classifier's logits to scalings: pure functions (SEMANTICS §2, "Gating"; X-LoRA paper, section 2).

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def activate(
    logits: Float[Tensor, "*tokens L E"], *, softmax: bool, temperature: float
) -> Float[Tensor, "*tokens L E"]:
    """Step 1: `softmax(z / temperature)` over the experts, or the logits as they are.

    This is what `get_latest_scalings()` and the scalings log show.
    """
    return torch.softmax(logits / float(temperature), dim=-1) if softmax else logits


def select(
    scalings: Float[Tensor, "*tokens L E"], *, top_k: int | None, renormalise: bool
) -> Float[Tensor, "*tokens L E"]:
    """Steps 2 and 3: keep the `top_k` largest (all if None), then, if asked, a softmax over the kept ones.

    What is kept is known by index, never by value, so that a selected scaling of exactly zero stays selected.
    Temperature plays no part here.
    """
    if top_k is None or top_k >= scalings.shape[-1]:
        return torch.softmax(scalings, dim=-1) if renormalise else scalings
    kept = largest(scalings, top_k)
    if renormalise:
        return torch.softmax(scalings.masked_fill(~kept, -torch.inf), dim=-1)
    return scalings.masked_fill(~kept, 0.0)


def largest(scalings: Float[Tensor, "*tokens E"], k: int) -> Bool[Tensor, "*tokens E"]:
    """True at exactly the `k` largest entries of the last dimension, ties broken as `torch.topk` breaks them."""
    chosen = scalings.topk(k, dim=-1).indices
    return torch.zeros_like(scalings, dtype=torch.bool).scatter(-1, chosen, True)
