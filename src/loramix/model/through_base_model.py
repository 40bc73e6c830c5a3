"""The model's methods, reached through `model.base_model`.

PEFT wraps a base model twice: `model.base_model` is an `XLoraModel`, and `model.base_model.model` the base model. Here
the model is its base model, and `model.base_model` transformers' backbone. From there these names reach the model,
unless the backbone has a member of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import PreTrainedModel

from loramix.errors import UnsupportedOperationError
from loramix.layers.slot import is_running
from loramix.model.peft_names import RefusedMethods
from loramix.model.xlora_methods import XLoraMethods
from loramix.passes.specialise import Specialised
from loramix.routers.classifier import XLoraClassifier

_MODEL = "_loramix_model"


class PartMethods(RefusedMethods):
    """The first base of the classes of a mixture's parts."""

    @property
    def base_model_prefix(self) -> str:
        """As in the part's own class; nothing where it would name the model around it."""
        prefix: str = super().base_model_prefix  # pyright: ignore
        return prefix if prefix in self.__dict__["_modules"] else ""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: a part has no router."""
        self._refuse("save_pretrained")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Likewise."""
        self._refuse("push_to_hub")

    def _refuse(self, call: str) -> NoReturn:
        raise UnsupportedOperationError(
            "A mixture, or an expert, is saved from the whole model.",
            received=f"{call}() of a {type(self).__name__}, which is a part of it",
            remedy=f"call {call}() of the model that get_peft_model or from_pretrained returned",
        )


class ThroughBaseModel:
    """The last base of a backbone's class: the model, and the names of its methods."""


class _OfTheModel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, backbone: Any, owner: type) -> Any:
        if backbone is None:
            return self
        members: Mapping[str, Any] = backbone.__dict__.get("_modules", {})
        if self._name in members:
            return members[self._name]
        model = backbone.__dict__.get(_MODEL)
        if model is None or is_running():  # in its forward, a backbone looks for members of its own
            raise AttributeError(self._name)
        return model if self._name == "model" else getattr(model, self._name)


for _name in {"model", "prepare_inputs_for_generation", XLoraClassifier.attribute, *dir(XLoraMethods)}:
    if not _name.startswith("_"):
        setattr(ThroughBaseModel, _name, _OfTheModel(_name))


def let_through(model: PreTrainedModel, to: PreTrainedModel | None = None) -> None:
    """Let the backbone of a model know the model, which its `base_model` is not; or another that is to have it."""
    backbone: Any = model.base_model
    if backbone is not model and isinstance(backbone, Specialised):
        backbone.__dict__[_MODEL] = to or model
