"""Gradient checkpointing that recomputes a block with the routing of its forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from loramix.errors import ConfigurationError
from loramix.layers.slot import checkpoint_with


class RoutedCheckpointing:
    """Mixin of every model from the carrier up: gradient checkpointing with the routing of the original forward."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        function = _routed_checkpoint(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **options)  # pyright: ignore

    def enable_input_require_grads(self) -> None:
        """Nothing to do: only re-entrant checkpointing needs inputs with gradients."""


def route_checkpoints(model: nn.Module, *, dry_run: bool = False) -> None:
    """The same for a model whose checkpointing was enabled before it got its experts.

    Args:
        model: the base model.
        dry_run: only check.

    Raises:
        ConfigurationError: it is re-entrant.
    """
    for module in model.modules():
        given = module.__dict__.get("_gradient_checkpointing_func")
        if given is not None:
            function = _routed_checkpoint(given)
            if not dry_run:
                module.__dict__["_gradient_checkpointing_func"] = function


def _routed_checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    given: Mapping[str, Any] = getattr(function, "keywords", {})
    if given.get("use_reentrant"):
        raise ConfigurationError(
            "A mixture needs non-reentrant gradient checkpointing.",
            received="gradient_checkpointing_kwargs={'use_reentrant': True}",
            remedy="pass gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    return functools.partial(checkpoint_with, functools.partial(function, use_reentrant=False))
