"""The loss of each token of some text.

B: batch. S: tokens of a text, the first of which is given, not predicted. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loramix.evaluation.passages import pad
from loramix.experts.base_layers import device_of
from loramix.passes.state import evaluating


def token_nats(logits: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S-1"]:
    """−ln p of each token after the first, p the probability that the model gave it."""
    return nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def text_nats(
    model: nn.Module, texts: Sequence[list[int]], batch: int, *, done: Callable[[int], object] = id
) -> list[Float[Tensor, " _"]]:
    """−ln p of each token after the first, (S − 1) for each text, on the CPU.

    Args:
        model: a causal language model, mixture or not; padding on the right does not change its predictions.
        texts: token ids of each.
        batch: texts in one forward.
        done: called after each forward, with the number of its texts.
    """
    device = device_of(model)
    found: list[Tensor] = []
    with evaluating(model):
        for i in range(0, len(texts), batch):
            chosen = texts[i : i + batch]
            ids, real = (tensor.to(device) for tensor in pad(chosen))
            nats = token_nats(model(input_ids=ids, attention_mask=real, use_cache=False).logits, ids).cpu()
            found += [row[: max(0, len(text) - 1)] for row, text in zip(nats, chosen, strict=True)]
            done(len(chosen))
    return found
