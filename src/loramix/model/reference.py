"""The model that a trainer compares with: the mixture as it is now."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

from torch import nn

from loramix.errors import UnsupportedOperationError
from loramix.model.peft_methods import PeftMethods
from loramix.model.several import keep_one, tensors_of_others
from loramix.passes.specialise import Specialised

_Model = TypeVar("_Model")


def create_reference_model(model: _Model) -> _Model:
    """A model that computes what this one computes now, and stays so while this one trains.

    What trains (the router, experts, heads) is copied, with settings and fixed routing; the weights that do not train
    are shared. Nothing in the reference requires gradients, and it is in evaluation mode. What is attached to the
    model, such as objectives, and blocks of code that change it (`fixed_scalings`, `disable_adapter`) are its alone. Of
    several mixtures it is the one in use.

    Args:
        model: a mixture, or a model with one LoRA expert. Choose what trains before: a weight that requires gradients
            only later trains in the reference too.

    Raises:
        UnsupportedOperationError: a model without experts.
    """
    if not isinstance(model, PeftMethods):
        raise UnsupportedOperationError(
            "The reference is made of a model with experts.",
            received=f"a {type(model).__name__}",
            remedy="pass the model that get_peft_model(…) returned, not a wrapper around it",
        )
    source = cast(nn.Module, model)
    constant = [parameter for parameter in source.parameters() if not parameter.requires_grad]
    # Quantised weights may be buffers; batch norms write into buffers of a floating dtype.
    constant += [buffer for buffer in source.buffers() if not buffer.is_floating_point()]
    constant += tensors_of_others(source)
    reference = copy.deepcopy(source, {id(tensor): tensor for tensor in constant})
    keep_one(reference)
    for part in reference.modules():
        if isinstance(part, Specialised):
            _forget_trainer(part)
    cast(PeftMethods, reference)._loramix.thawed = []  # pyright: ignore[reportPrivateUsage] - shared; the model's
    return cast(_Model, reference.requires_grad_(False).eval())


def _forget_trainer(part: Any) -> None:
    """Drop the forward that a trainer has put on the model: it would go on calling that model."""
    own = vars(part)
    own.pop("_is_accelerate_prepared", None)
    if "_old_forward" not in own:
        own.pop("forward", None)
