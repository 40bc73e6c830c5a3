"""Run-time subclasses of a model's classes: the base model's own names, with the forward of a mixture.

The class of every model from the carrier, the nearest `PreTrainedModel` above the adapted layers, up to the root
becomes such a subclass (docs/architecture.md, decisions 1 and 2).
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any, ClassVar, cast

from loramix.layers.resize import resizing
from loramix.passes.call import Role
from loramix.passes.checkpointing import RoutedCheckpointing
from loramix.passes.encoder_decoder import OUTPUTS, hands_on_encoded
from loramix.passes.forward import mixture_forward
from loramix.passes.head import routes_head
from loramix.passes.hooks import takes_expert_ids


@functools.cache
def specialise(kind: type, *first: type, last: type = object, role: Role, is_root: bool) -> type:
    """The run-time subclass of a model class, with the same names, so that look-ups by name still find it.

    Args:
        kind: the model's class.
        first: bases before it in the method resolution order.
        last: a base after it.
        role: which passes run here, if any.
        is_root: whether it is the whole model.
    """
    body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    body["_loramix_made_of"] = (kind, first, last, role, is_root)
    forward = cast(Any, kind).forward
    if role != "around":
        body["forward"] = forward = mixture_forward(forward, role)
    elif OUTPUTS in inspect.signature(forward).parameters:
        body["forward"] = forward = hands_on_encoded(forward)
    if is_root:
        body["forward"] = takes_expert_ids(routes_head(forward) if role == "around" else forward)
    bases = (*first, Specialised, RoutedCheckpointing, kind, *([] if last is object else [last]))
    return type(kind.__name__, bases, body)


def rebind_forward(model: Any) -> None:
    """Let a hook of accelerate, which keeps the forward that it wraps, wrap that of the model's present class."""
    if "_old_forward" in model.__dict__:
        model.__dict__["_old_forward"] = MethodType(type(model).forward, model)


class Specialised:
    """Mixin of every run-time subclass: it keeps the parts of the class, for pickle and for `restore`."""

    _loramix_made_of: ClassVar[tuple[type, tuple[type, ...], type, Role, bool]]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in the base model's class: a new, plain base model."""
        return cast(Any, cls._loramix_made_of[0]).from_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base model; experts of the embeddings add nothing to new tokens, and save their new sizes."""
        with resizing(cast(Any, self)):
            super().resize_token_embeddings(*args, **kwargs)  # pyright: ignore
        return cast(Any, self).get_input_embeddings()

    def restore(self) -> None:
        """Become an instance of the model's own class again."""
        for name in [name for name in self.__dict__ if name.startswith("_loramix")]:
            del self.__dict__[name]
        self.__class__ = self._loramix_made_of[0]
        rebind_forward(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._loramix_made_of, self.__getstate__()  # torch's, without what `compile` has made


def _rebuild(kind: type, first: tuple[type, ...], last: type, role: Role, is_root: bool) -> Any:
    special: Any = specialise(kind, *first, last=last, role=role, is_root=is_root)
    return special.__new__(special)
