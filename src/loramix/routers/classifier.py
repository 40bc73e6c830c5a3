"""The router: a small classifier from hidden states to one logit for each expert (X-LoRA paper, section 2).

B, S: batch, sequence. H: hidden size of the base model. L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError


def keep_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`move`, for a module whose precision is its own: devices change, `model.to(dtype)` passes it by."""

    def moved(tensor: Tensor) -> Tensor:
        target = move(tensor)
        return target if target.dtype == tensor.dtype else tensor.to(target.device)

    return moved


class XLoraClassifier(nn.Module):
    """Hidden states (B, S, H) to logits (B, S, L, E).

    depth 1: Linear(H, out). Depth d > 1: Linear(H, size), ReLU, Dropout, d - 2 times Linear(size, size), ReLU,
    Dropout, then Linear(size, out); every Linear with bias. out is E where all layers share their scalings, L · E
    with `layerwise_scalings`. Parameters and computation are float32, whatever the base model's dtype.

    Args:
        config: depth, size, dropout, layerwise; kept as `.config`, the model's live configuration.
        n_classes: E.
        n_layers: L.
        hidden_size: H; the configuration's own if not given.

    Attributes:
        layers: the `nn.Sequential`; its indices are part of the checkpoint format (SEMANTICS §4).
    """

    def __init__(self, config: XLoraConfig, n_classes: int, n_layers: int, hidden_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.n_classes = n_classes
        self.n_layers = n_layers
        self.hidden_size = config.hidden_size if hidden_size is None else hidden_size
        distinct = n_layers if config.layerwise_scalings else 1
        width, parts = self.hidden_size, list[nn.Module]()
        for _ in range(config.xlora_depth - 1):
            parts += [nn.Linear(width, config.xlora_size, dtype=torch.float32), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                parts.append(nn.Dropout(config.xlora_dropout_p))
            width = config.xlora_size
        self.layers = nn.Sequential(*parts, nn.Linear(width, distinct * n_classes, dtype=torch.float32))

    @staticmethod
    def tensors(config: XLoraConfig, *, layers: int, experts: int) -> dict[str, tuple[int, ...]]:
        """The classifier's tensors by name, and their shapes.

        The linear layers lie at every third place of the sequence with dropout, at every second without.

        Args:
            config: depth, sizes, dropout, layerwise.
            layers: L.
            experts: E.
        """
        step = 3 if config.xlora_dropout_p > 0 else 2
        out = experts * (layers if config.layerwise_scalings else 1)
        widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), out]
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(config.xlora_depth):
            shapes[f"layers.{i * step}.weight"] = (widths[i + 1], widths[i])
            shapes[f"layers.{i * step}.bias"] = (widths[i + 1],)
        return shapes

    def forward(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S L E"]:
        """Logits of every layer; where layers share them, one tensor seen L times."""
        return self.distinct(hidden).expand(-1, -1, self.n_layers, -1)

    def distinct(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S distinct E"]:
        """Logits without repetition: the third dimension is L, or 1 where all layers share them.

        Raises:
            ConfigurationError: hidden states of another width.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ConfigurationError(
                "hidden_size is the width of the base model's last hidden state.",
                received=f"hidden_size={self.hidden_size} for hidden states {tuple(hidden.shape)}",
                remedy=f"Use hidden_size={hidden.shape[-1]}.",
            )
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.layers(hidden.float())
        return logits.unflatten(-1, (-1, self.n_classes))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> XLoraClassifier:
        return super()._apply(keep_dtype(fn), recurse)
