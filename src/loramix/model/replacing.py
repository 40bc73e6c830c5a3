"""Building on a base model that carries experts already: PEFT's users keep the base model's object, and load again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from loramix.config.checks import warn
from loramix.layers.inject import put_on
from loramix.model.own_weights import present_rows, put_rows
from loramix.model.peft_methods import PeftMethods, layers_of
from loramix.model.several import refuse_several
from loramix.passes.specialise import Specialised, rebind_forward
from loramix.passes.state import AdaptedState, MixtureState


@contextmanager
def replacing(model: Any) -> Generator[None]:
    """Inside, a model that carries experts is without them; if what is built there fails, they are put back.

    Warns that they are replaced.

    Args:
        model: what a mixture, or one expert, is to be built on.

    Raises:
        UnsupportedOperationError: whole blocks were offloaded with the experts in them; or several mixtures.
    """
    if not isinstance(model, PeftMethods):
        yield
        return
    refuse_several(model, "building on it")
    put_back = _taken_out(model)
    try:
        yield
    except BaseException:
        put_back()
        raise
    warn(
        "The model carried experts, which were replaced: a model is its base model. Load the base model anew to have "
        "both."
    )


def _taken_out(model: Any) -> Callable[[], None]:
    """Take the experts out; what is returned puts them back, to the last bit."""
    state: AdaptedState = model._loramix
    layers, rows = layers_of(model), present_rows(model, state)
    special = [
        (part, type(part), {name: value for name, value in part.__dict__.items() if name.startswith("_loramix")})
        for part in model.modules()
        if isinstance(part, Specialised)
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.unload()

    def put_back() -> None:
        put_rows(model, state, rows)
        for path, layer in layers.items():
            put_on(model, path, layer)
        if isinstance(state, MixtureState):
            model.add_module(state.router.attribute, state.router)
        for part, kind, members in special:
            part.__dict__.update(members)
            part.__class__ = kind
        for part, *_ in special:
            rebind_forward(part)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)

    return put_back
