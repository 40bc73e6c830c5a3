"""An adapted layer: what stood there before, called as a black box, plus what the experts add to it.

y = base(x) + Σ_stacks Δ(x)                                                   (docs/semantics.md §2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from loramix.errors import RoutingError, UnsupportedOperationError
from loramix.experts.adapter import LoraWeights
from loramix.experts.base_layers import Kind, kind_of
from loramix.experts.blocks import form_of
from loramix.experts.offload import with_weights
from loramix.experts.weight_products import WeightProducts
from loramix.layers.block import BlockStack, mixed
from loramix.layers.convolution import ConvolutionStack
from loramix.layers.dora import DoraStack
from loramix.layers.embedding import EmbeddingStack
from loramix.layers.linear import LinearStack
from loramix.layers.routing import Routing
from loramix.layers.slot import called, current, weight_read
from loramix.layers.stack import ExpertStack, LayerExpert

_STACKS: dict[Kind, type[ExpertStack]] = {
    "linear": LinearStack,
    "embedding": EmbeddingStack,
    "convolution": ConvolutionStack,
    "block": BlockStack,
    "gate": LinearStack,
}


STACK = "stacks.0"
"""The stack of a layer's only mixture, in the layer's keys."""


class XLoraLayer(nn.Module):
    """A layer of the base model and the experts that adapt it.

    Args:
        base_layer: the layer that is adapted; called as it is.
        *stacks: the experts; what several stacks add is summed.

    Raises:
        RoutingError (the forward): outside the passes of the model, or with scalings of other tokens.
        UnsupportedOperationError (the backward): a base layer that has no gradient for its input.
    """

    apart: Callable[[int], Routing] | None = None
    """What gives the layer, by its number, its routing in place of the pass: where it runs outside, or where the router
    cannot scale it."""

    def __init__(self, base_layer: nn.Module, *stacks: ExpertStack) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.stacks = nn.ModuleList(stacks)

    @property
    def stack(self) -> ExpertStack:
        """The experts of the only mixture."""
        (only,) = self.stacks
        return cast(ExpertStack, only)

    @property
    def weight(self) -> Any:
        """The base layer's weight, for code of the base model that looks at it and calls the layer."""
        weight_read(self)
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias, likewise."""
        return self.base_layer.bias

    def __getattr__(self, name: str) -> Any:
        """The base layer's sizes and settings, such as a convolution's stride, for code that looks at them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__.get("_modules", {}).get("base_layer"), name, None)
            if not isinstance(value, int | float | str | tuple):
                raise
            return value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Weight and bias go to the base layer: transformers ties a head to its embedding anew."""
        own = super() if name not in ("weight", "bias") else cast(Any, self.base_layer)
        own.register_parameter(name, param)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        routing = self._routing()
        modules = cast("dict[str, nn.Module]", self._modules)  # as attributes they are looked for, each time
        base_layer = modules["base_layer"]
        base_y: Tensor = base_layer(x, *args, **kwargs)
        called(self)
        if routing.silent:
            return base_y
        if x.requires_grad and not base_y.requires_grad and torch.is_grad_enabled():
            base_y = cast(Tensor, _WithoutGradient.apply(base_y, x, type(base_layer).__name__))
        stacks = cast("dict[str, ExpertStack]", modules["stacks"]._modules)
        y = base_y if len(stacks) == 1 else base_y.clone()
        for stack in stacks.values():
            if "_hf_hook" in stack.__dict__:
                y = with_weights(stack, stack.add_to, y, x, routing, base_layer, base_y)
            else:
                y = stack.add_to(y, x, routing, base_layer, base_y)
        return y

    def _routing(self) -> Routing:
        return current() if self.apart is None else self.apart(cast(ExpertStack, self.stacks[0]).number)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Earlier checkpoints of trainers hold the matrices of the only stack as the layer's own."""
        for name in ("lora_A", "lora_B", "lora_magnitude"):
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{STACK}.{name}"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _WithoutGradient(torch.autograd.Function):
    """The output of a base layer that has no gradient for its input; whoever asks for it gets an error, not zeros."""

    @staticmethod
    def forward(ctx: Any, base_y: Tensor, x: Tensor, base_layer: str) -> Tensor:
        ctx.base_layer = base_layer
        return base_y.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> NoReturn:
        raise UnsupportedOperationError(
            "A base layer hands gradients on to its input, for what is trained before it.",
            received=f"a {ctx.base_layer} whose output has none, as of layers that quantise their input",
            remedy="train on the base model as it was before, or with weights quantised alone",
        )


class XLoraGate(XLoraLayer):
    """An adapted module that multiplies by its own weight and goes on with the product: the delta is added to that.

    Raises:
        RoutingError (the forward): the module does not multiply by its weight once.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = self._routing()
        return self.base_layer(x, *args, **kwargs) if routing.silent else self._mixed(routing, x, *args, **kwargs)

    # Compiled, the product would be made without the delta.
    @torch._disable_dynamo  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    def _mixed(self, routing: Routing, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        def adapted(x: Tensor, y: Tensor) -> Tensor:
            for stack in cast("Sequence[ExpertStack]", self.stacks):
                y = stack.add_to(y, x, routing, self.base_layer, y)
            return y

        with WeightProducts(cast(Tensor, self.base_layer.weight), adapted) as products:
            out = self.base_layer(x, *args, **kwargs)
        if products.count != 1:
            raise RoutingError(
                "Experts adapt a module that multiplies its input by its weight, once.",
                received=f"a {type(self.base_layer).__name__} with {products.count} such products",
                remedy="train the expert without this module",
            )
        return out


class XLoraBlock(nn.Module):
    """A mixture-of-experts block of the base model, with an `XLoraLayer` for each of its parameters that is adapted.

    These have the parameters' names; their base layers are no modules, and what they add is computed here.

    Args:
        base_layer: the block.

    Raises:
        RoutingError (the forward): as for `XLoraLayer`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, hidden_states: Tensor, *chosen: Tensor) -> Tensor:
        routing, form = current(), form_of(self.base_layer)
        if routing.silent:
            return self.base_layer(hidden_states, *chosen)
        assert form is not None
        layers = {name: layer for name, layer in self.named_children() if isinstance(layer, XLoraLayer)}
        stacks = {name: cast("list[BlockStack]", list(layer.stacks)) for name, layer in layers.items()}
        return mixed(self.base_layer, form, stacks, routing, hidden_states, *chosen)


def stack_class(module: nn.Module, experts: Sequence[LayerExpert]) -> type[ExpertStack] | None:
    """The stack that holds these experts of a module of the base model; None where no stack can."""
    kind = kind_of(module)
    if kind == "linear" and any(e.weights.magnitude is not None for e in experts):
        return DoraStack
    return None if kind is None else _STACKS[kind]


def new_layer(
    module: nn.Module, experts: Sequence[LayerExpert], number: int, *, dtype: torch.dtype | None = None
) -> XLoraLayer:
    """A module of the base model with the matrices of its experts, yet to be filled; arguments as for `ExpertStack`.

    The module must be one that experts can adapt (`refuse_module` refuses the others).
    """
    kind = stack_class(module, experts)
    assert kind is not None
    wrapper = XLoraGate if kind_of(module) == "gate" else XLoraLayer
    return wrapper(module, kind(module, experts, number, dtype=dtype))


def fill(layers: Sequence[XLoraLayer], experts: Sequence[Sequence[LayerExpert]]) -> None:
    """Move the experts' tensors into new layers, one expert after the other.

    So the memory map of a file is read and released before that of the next one is.

    Args:
        layers: as `new_layer` made them.
        experts: those of each layer.
    """
    moves: list[tuple[int, LoraWeights, LoraWeights]] = []
    for layer, members in zip(layers, experts, strict=True):
        parts = layer.stack.parts
        moves += [(e.expert, e.weights, parts[e.expert]) for e in members]
    for _, weights, part in sorted(moves, key=itemgetter(0)):
        weights.move_into(part)
    for layer in layers:
        layer.stack.settle(layer.base_layer)


def adapted_layer(
    module: nn.Module, experts: Sequence[LayerExpert], number: int, *, dtype: torch.dtype | None = None
) -> XLoraLayer:
    """A module of the base model with its experts: `new_layer`, filled."""
    layer = new_layer(module, experts, number, dtype=dtype)
    fill([layer], [experts])
    return layer
