"""A head that only has to guess: the language model's head in int8, for drafts on a CPU.

A draft needs the largest logit and nothing else, and a wrong one costs time and no text. So the weights, which are read
once for each draft and are the largest matrix of a small model, are rounded to one byte each: row v to w_v / s_v with
s_v = max |w_v| / 127.

V: vocabulary. H: hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LEAST = 2**22  # weights from which on rounding pays: a head of 4 million


class DraftHead:
    """int8 weights of a head, with a scale for each row.

    Args:
        weight: (V, H), float32, on the CPU.
    """

    def __init__(self, weight: Float[Tensor, "V H"]) -> None:
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.weight = (weight / scales[:, None]).round_().to(torch.int8)
        self.scales = scales.bfloat16()

    @staticmethod
    def of(head: object) -> DraftHead | None:
        """The rounded twin of a head; None where its own is as good: a small one, or not float32, or not on the CPU."""
        if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
            return None
        weight = head.weight.detach()
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < LEAST:
            return None
        made = DraftHead(weight)
        try:
            made(weight.new_zeros(1, weight.shape[1]))
        except (RuntimeError, AttributeError):  # a build of PyTorch without this product
            return None
        return made

    def __call__(self, hidden: Float[Tensor, "*rows H"]) -> Int[Tensor, " *rows"]:
        """The token with the largest logit."""
        flat = hidden.reshape(-1, hidden.shape[-1]).bfloat16()
        logits = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scales)
        return logits.argmax(-1).reshape(hidden.shape[:-1])
