"""Weights that accelerate keeps elsewhere, and brings for the forward of their own module alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loramix.errors import UnsupportedOperationError

_Result = TypeVar("_Result")


def with_weights(module: nn.Module, call: Callable[..., _Result], *args: Any) -> _Result:
    """Call, while the tensors of a module itself are where it computes.

    Args:
        module: the module, which may be offloaded.
        call: what reads its tensors outside its forward.
        *args: for the call.

    Raises:
        UnsupportedOperationError: an offloaded tensor that is to train: its gradient would be lost.
    """
    hook = module.__dict__.get("_hf_hook")
    if hook is None or not is_away(module):
        return call(*args)
    refuse_training(module)
    hook.pre_forward(module)
    try:
        return call(*args)
    finally:
        hook.post_forward(module, None)


def is_away(module: nn.Module) -> bool:
    """Whether a tensor of the module itself has no values at present."""
    return any(tensor.is_meta for tensor in _own_tensors(module))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate brings an offloaded module's tensors; None for a module whose tensors it does not move."""
    devices = (each.execution_device for each in _hooks(module) if each.offload)
    return next((torch.device(device) for device in devices if device is not None), None)


def kept_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, also of an offloaded module."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with torch.no_grad():
        return with_weights(module, getattr, module, leaf)


class KeptTensors(dict[str, Tensor]):
    """A model's tensors by name; offloaded ones are read when they are asked for.

    Args:
        model: the model.
        given: tensors that stand for the model's own.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        own: dict[str, Any] = model.state_dict()
        super().__init__({name: tensor for name, tensor in own.items() if not getattr(tensor, "is_meta", False)})
        self.update(given)
        self._model = model

    def __missing__(self, name: str) -> Tensor:
        return kept_tensor(self._model, name)


def refuse_training(module: nn.Module) -> None:
    """Raises UnsupportedOperationError: gradients are being recorded for a tensor, in the module, that is offloaded."""
    if torch.is_grad_enabled() and any(p.is_meta and p.requires_grad for p in module.parameters()):
        raise UnsupportedOperationError(
            "What trains is in memory.",
            received=f"a {type(module).__name__} with offloaded parameters that require gradients",
            remedy="put the experts on a base model that is offloaded already, instead of offloading the mixture",
        )


def refuse_held(model: nn.Module) -> None:
    """Raises UnsupportedOperationError: accelerate moves whole blocks of the model, with all that is in them."""
    for path, module in model.named_modules():
        if any(each.offload and each.place_submodules for each in _hooks(module)):
            raise UnsupportedOperationError(
                "Layers are read and replaced in memory, or where they are offloaded one by one.",
                received=f"{path!r}, which accelerate has offloaded as a whole (preload_module_classes)",
                remedy="bring the weights back first: accelerate.hooks.remove_hook_from_module(model, recurse=True)",
            )


def _hooks(module: nn.Module) -> list[Any]:
    """Those of accelerate that move tensors."""
    hook: Any = module.__dict__.get("_hf_hook")
    return [each for each in getattr(hook, "hooks", (hook,)) if hasattr(each, "place_submodules")]


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))
