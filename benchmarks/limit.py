"""The arithmetic limit: how much more a mixture multiplies than its base model, however it is written.

A token costs the base model ΣW + head multiplications: the weights of its linear layers and of its head. A mixture
runs the backbone twice, the experts once, and the head once: 2 ΣW + ΣR(in + out) + head. Left out, on both sides: the
router, norms, and, where texts are short, attention: 2 · S · H for each block and pass (2 % of ΣW at H 512 and S 64).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from loramix import XLoraLayer


@dataclass(frozen=True)
class Weights:
    """Multiplications for one token: the weights of each part.

    Args:
        backbone: ΣW, all linear layers but the head.
        experts: ΣR(in + out), all experts of all adapted layers.
        head: the head.
    """

    backbone: int
    experts: int
    head: int

    def forward_limit(self) -> float:
        """Of a forward with logits at every token."""
        return self.limit(tokens=1, logits=1)

    def generate_limit(self, prompt: int, new: int) -> float:
        """Of `generate` with a cache: the head is asked for `new` tokens only, the last one is never read again."""
        return self.limit(tokens=prompt + new - 1, logits=new)

    def training_limit(self, scaling_passes: int) -> float:
        """Of a router's training step, to the base model's forward with logits at every token.

        The mixture pass, and in backward as much again, since no weight but the router's has a gradient: the gradients
        of the activations, through the backbone, both matrices of each expert, and the head.
        """
        step = (scaling_passes + 2) * self.backbone + 2 * self.experts + 2 * self.head
        return step / (self.backbone + self.head)

    def limit(self, tokens: int, logits: int, attention: float = 0) -> float:
        """Of anything that reads `tokens` tokens and gives logits at `logits` of them.

        Args:
            tokens: read.
            logits: tokens that meet the head.
            attention: multiplications of a token with the keys and values that it sees, in one pass.
        """
        backbone = self.backbone + attention
        mixture = tokens * (2 * backbone + self.experts) + logits * self.head
        return mixture / (tokens * backbone + logits * self.head)


def weights_of(mixture: nn.Module, head: nn.Linear) -> Weights:
    """Count the weights of a mixture; the router's are left out."""
    router = set(mixture.get_submodule("internal_xlora_classifier").modules())
    linears = [m for m in mixture.modules() if isinstance(m, nn.Linear) and m is not head and m not in router]
    layers = [m for m in mixture.modules() if isinstance(m, XLoraLayer)]
    return Weights(
        backbone=sum(m.weight.numel() for m in linears),
        experts=sum(sum(p.numel() for p in m.stack.parameters()) for m in layers),
        head=head.weight.numel(),
    )
