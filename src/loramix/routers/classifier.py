"""X-LoRA's router: a small classifier from hidden states to one logit for each expert (X-LoRA paper, section 2).

B, S: batch, sequence. H: hidden size of the base model. L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.routers.gating import Gating
from loramix.routers.router import HiddenStateRouter, RouterSizes, Shapes, register_router
from loramix.routers.start import LinearRouter, Method


@register_router
class XLoraClassifier(HiddenStateRouter):
    """Hidden states (B, S, H) to logits (B, S, L, E).

    depth 1: Linear(H, out). Depth d > 1: Linear(H, size), ReLU, Dropout, d - 2 times Linear(size, size), ReLU,
    Dropout, then Linear(size, out). out is E where all layers share their scalings, L · E with `layerwise_scalings`.
    Every Linear has a bias, unless `use_bias` is off; without `enable_relu_and_dropout` the Linears follow each other.
    Parameters and computation are float32, whatever the base model's dtype.

    Args:
        config: depth, size, dropout, layerwise, bias, ReLU; kept as `.config`, the model's live configuration.
        n_classes: E.
        n_layers: L.
        hidden_size: H; the configuration's own if not given.

    Attributes:
        layers: the `nn.Sequential`; its indices are part of the checkpoint format (docs/semantics.md §4).
    """

    kind = "classifier"
    attribute = "internal_xlora_classifier"

    def __init__(self, config: XLoraConfig, n_classes: int, n_layers: int, hidden_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.n_classes = n_classes
        self.n_layers = n_layers
        self.hidden_size = config.hidden_size if hidden_size is None else hidden_size
        distinct = n_layers if config.layerwise_scalings else 1
        width, parts = self.hidden_size, list[nn.Module]()
        linear = partial(nn.Linear, bias=config.use_bias, dtype=torch.float32)
        for _ in range(config.xlora_depth - 1):
            between = [nn.ReLU(), nn.Dropout(config.xlora_dropout_p)]
            parts += [linear(width, config.xlora_size), *between[: _step(config) - 1]]
            width = config.xlora_size
        self.layers = nn.Sequential(*parts, linear(width, distinct * n_classes))

    @property
    def override_scaling_pass_value(self) -> float:
        """PEFT's name of the live configuration's `scaling_pass_value`."""
        return self.config.scaling_pass_value

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        return cls(config, sizes.experts, sizes.layers, sizes.hidden_size)

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        out = sizes.experts * (sizes.layers if config.layerwise_scalings else 1)
        widths = [sizes.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), out]
        shapes: Shapes = {}
        for i in range(config.xlora_depth):
            place = f"layers.{i * _step(config)}"
            shapes[f"{place}.weight"] = (widths[i + 1], widths[i])
            if config.use_bias:
                shapes[f"{place}.bias"] = (widths[i + 1],)
        return shapes

    @classmethod
    def describe(cls, config: XLoraConfig) -> Mapping[str, Any]:
        return {
            "depth": config.xlora_depth,
            "hidden_size": int(config.hidden_size),
        }

    @classmethod
    def check_start(cls, config: XLoraConfig, experts: int, method: Method) -> None:
        if not (config.use_bias and config.enable_relu_and_dropout):
            raise ConfigurationError(
                "The start of a router is written into a classifier with biases and ReLU.",
                received=f"use_bias={config.use_bias}, enable_relu_and_dropout={config.enable_relu_and_dropout}",
                remedy="Leave both settings out, or train from a random start.",
            )
        if method != "zeros" and config.xlora_depth > 1 and config.xlora_size < 2 * experts:
            raise ConfigurationError(
                "A router with hidden layers carries a linear map through pairs of units, two for each expert.",
                received=f"xlora_size={config.xlora_size} for {experts} experts",
                remedy=f"Use xlora_size={2 * experts} or more, or xlora_depth=1.",
            )

    @torch.no_grad()
    def start_uniform(self, gating: Gating) -> None:
        last = self._linears()[-1]
        last.weight.zero_()
        last.bias.fill_(gating.uniform(self.n_classes))

    @torch.no_grad()
    def set_linear(self, router: LinearRouter) -> None:
        """Compute z = scale · (W h + b) exactly, whatever the depth.

        Pairs of units carry it through ReLU layers, relu(a) − relu(−a) = a. The other units keep their random weights
        and reach the output with weight zero, so that training can use them.

        Raises:
            ConfigurationError: hidden layers with fewer than 2 E units.
        """
        self.check_start(self.config, self.n_classes, "labels")
        linears, experts = self._linears(), self.n_classes
        weight, bias = router.scale * router.weight, router.scale * router.bias
        repeats = linears[-1].out_features // experts
        if len(linears) == 1:
            _fill(linears[0], weight.repeat(repeats, 1), bias.repeat(repeats))
            return
        _fill_rows(linears[0], torch.cat([weight, -weight]), torch.cat([bias, -bias]))
        pairs = torch.eye(2 * experts)
        for linear in linears[1:-1]:
            rows = torch.zeros(2 * experts, linear.in_features)
            rows[:, : 2 * experts] = pairs
            _fill_rows(linear, rows, torch.zeros(2 * experts))
        out = torch.zeros(experts, linears[-1].in_features)
        out[:, : 2 * experts] = torch.cat([torch.eye(experts), -torch.eye(experts)], dim=1)
        _fill(linears[-1], out.repeat(repeats, 1), torch.zeros(experts * repeats))

    def _linears(self) -> list[nn.Linear]:
        return [module for module in self.layers if isinstance(module, nn.Linear)]

    @classmethod
    def cold_expert(
        cls,
        config: XLoraConfig,
        columns: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        share: float,
        offset: float,
    ) -> dict[str, Tensor]:
        if offset and not config.use_bias:
            raise UnsupportedOperationError(
                "A new expert of a classifier is kept low by its bias.",
                received="use_bias=False",
                remedy="give the expert's tensors (column=)",
            )
        return {
            name: share * tensor.mean(-1) + (offset if name.endswith(".bias") else 0.0)
            for name, tensor in columns.items()
        }

    def forward(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S L E"]:
        """Logits of every layer; where layers share them, one tensor seen L times."""
        return self.distinct(hidden).expand(-1, -1, self.n_layers, -1)

    def distinct(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S distinct E"]:
        if hidden.shape[-1] != self.hidden_size:
            raise ConfigurationError(
                "hidden_size is the width of the base model's last hidden state.",
                received=f"hidden_size={self.hidden_size} for hidden states {tuple(hidden.shape)}",
                remedy=f"Use hidden_size={hidden.shape[-1]}.",
            )
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.layers(hidden.float())
        return logits.unflatten(-1, (-1, self.n_classes))


def _fill(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def _fill_rows(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight[: len(weight)] = weight.to(linear.weight)
    linear.bias[: len(bias)] = bias.to(linear.bias)


def _step(config: XLoraConfig) -> int:
    """The linear layers' distance in the sequence: with ReLU and dropout, with ReLU alone, or without either."""
    if not config.enable_relu_and_dropout:
        return 1
    return 3 if config.xlora_depth > 1 and config.xlora_dropout_p > 0 else 2
