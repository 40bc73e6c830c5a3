"""Several mixtures on one base model: each has modules of its own, around tensors of the base model that all share.

    a mixture's modules   backbone, adapted layers, router and head, as if it were alone
    the model             the object that a user has; its modules are those of the mixture in use in this thread

So what is done with the model, whatever reads or changes its modules, is done with one mixture, and none of the code
around mixtures knows of others. Weights that a mixture replaces are copied for it (`own_weights`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.experts.base_layers import is_quantised
from loramix.experts.offload import is_away
from loramix.model.own_weights import SHARED, replaced_parameters
from loramix.passes.specialise import rebind_forward, specialise
from loramix.passes.state import AdaptedState, MixtureState

Members = dict[str, Any]
_MIXTURES = "_loramix_mixtures"
_OWN = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training", "_loramix")
"""The attributes of a model that each of its mixtures has."""


class Mixtures:
    """The mixtures of one model, and which is in use in each thread.

    A copied or unpickled model starts with the one that was in use in the thread that copied it.

    Args:
        members: each mixture's own of the model's attributes, by its name.
        first: the mixture that a thread uses until it chooses another.
    """

    def __init__(self, members: dict[str, Members], first: str) -> None:
        self.members, self.first = members, first
        self._thread = _Thread(self)

    @property
    def in_use(self) -> str:
        """The name of the mixture in use in this thread."""
        return self._thread.in_use

    @in_use.setter
    def in_use(self, name: str) -> None:
        self._thread.in_use = name

    @property
    def current(self) -> Members:
        """What is its own.

        Raises:
            UnsupportedOperationError: it was unloaded in another thread.
        """
        found = self.members.get(self.in_use)
        if found is None:
            raise UnsupportedOperationError(
                "A thread uses one of the mixtures that are loaded.",
                received=f"{self.in_use!r}, which was unloaded meanwhile",
                remedy=f"choose another in this thread: use_mixture(…) with one of {', '.join(self.members)}",
            )
        return found

    @property
    def needed(self) -> set[str]:
        """Those that this thread uses, or goes back to at the end of a `with`."""
        return {self.in_use, *self._thread.outer}

    @contextmanager
    def using(self, before: str, name: str) -> Generator[None]:
        """Inside, in this thread, a mixture is in use; then again the one before."""
        self.in_use, self._thread.outer = name, (*self._thread.outer, before)
        try:
            yield
        finally:
            self.in_use, self._thread.outer = before, self._thread.outer[:-1]

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "first": self.in_use}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class _Thread(threading.local):
    def __init__(self, mixtures: Mixtures) -> None:  # once in each thread
        self.in_use = mixtures.first
        self.outer: tuple[str, ...] = ()


class _OfTheMixtureInUse:
    """An attribute of a model that each mixture has its own of."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, model: Any, owner: type) -> Any:
        return self if model is None else model.__dict__[_MIXTURES].current[self._name]

    def __set__(self, model: Any, value: Any) -> None:
        model.__dict__[_MIXTURES].current[self._name] = value


class SeveralMixtures:
    """The first base of the class of a model with several mixtures: its attributes `_OWN` are the mixture's in use.

    In its `__dict__`, where torch looks whether they exist, are those of one of them.
    """

    def __getattr__(self, name: str) -> Any:
        if _MIXTURES in self.__dict__:
            for kind in (self._parameters, self._buffers, self._modules):
                if name in kind:
                    return kind[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = {nn.Parameter: self._parameters, nn.Buffer: self._buffers, nn.Module: self._modules}
        own = next((own for kind, own in kinds.items() if isinstance(value, kind) or name in own), None)
        if own is None:
            object.__setattr__(self, name, value)
        else:
            self.__dict__.pop(name, None)
            own[name] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of all mixtures; what they share stays shared."""
        mixtures: Mixtures = self.__dict__[_MIXTURES]
        shared = [places for places in _places(mixtures).values() if len(places) > 1]
        for name in mixtures.members:
            with mixtures.using(mixtures.in_use, name):
                super()._apply(fn, recurse)  # pyright: ignore
        for (holder, key), *others in shared:
            for other, name in others:
                other[name] = holder[key]
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: all mixtures share the vocabulary."""
        refuse_several(self, "resize_token_embeddings()")
        return super().resize_token_embeddings(*args, **kwargs)  # pyright: ignore

    def restore(self) -> None:
        """Become an instance of the model's own class again, with the modules of the mixture in use."""
        self.__dict__.update(self.__dict__[_MIXTURES].current)
        self.__class__ = _class_without(self)
        cast(Any, self).restore()

    def _replicate_for_data_parallel(self) -> Any:
        refuse_several(self, "torch.nn.DataParallel")
        return super()._replicate_for_data_parallel()  # pyright: ignore

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | self.__dict__[_MIXTURES].current  # pyright: ignore


for _name in _OWN:
    setattr(SeveralMixtures, _name, _OfTheMixtureInUse(_name))


def _places(mixtures: Mixtures) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Where each tensor of the mixtures is kept."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for holder in (holder for members in mixtures.members.values() for holder in _holders(members)):
        for name, tensor in holder.items():
            if tensor is not None:
                places.setdefault(id(tensor), []).append((holder, name))
    return places


def _holders(members: Members) -> Iterator[dict[str, Any]]:
    """The dictionaries in which the modules of a mixture keep their tensors."""
    inner = {id(part): part for child in members["_modules"].values() if child for part in child.modules()}
    for own in (members, *(part.__dict__ for part in inner.values())):
        yield from (own["_parameters"], own["_buffers"])


_changing = threading.Lock()


def mixtures_of(model: nn.Module) -> Mixtures | None:
    """The mixtures of a model that has had several; None of any other."""
    return model.__dict__.get(_MIXTURES)


def names_of(model: nn.Module) -> list[str]:
    """The names of a model's mixtures."""
    mixtures = mixtures_of(model)
    return [cast(Any, model)._loramix.name] if mixtures is None else list(mixtures.members)


def refuse_taken(model: nn.Module, name: str) -> None:
    """Raises ConfigurationError: no name for another mixture of the model."""
    names = names_of(model)
    if not name or name in names:
        raise ConfigurationError(
            "Each mixture of a model has a name of its own.",
            received=f"name={name!r}, beside {', '.join(map(repr, names))}",
            remedy="choose another name, or call unload_mixture(…) first",
        )


def tensors_of_others(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of the mixtures that are not in use."""
    mixtures = mixtures_of(model)
    if mixtures is None:
        return
    for members in (members for members in mixtures.members.values() if members is not mixtures.current):
        yield from (tensor for holder in _holders(members) for tensor in holder.values() if tensor is not None)


def keep_one(model: nn.Module) -> None:
    """Drop the mixtures that are not in use."""
    mixtures = mixtures_of(model)
    if mixtures is not None:
        for name in [name for name in mixtures.members if name != mixtures.in_use]:
            drop(model, name)


def add(model: PreTrainedModel, name: str, other: PreTrainedModel) -> None:
    """Give a model one more mixture.

    Args:
        model: it has at least one.
        name: of the new one.
        other: the new mixture alone, on a `base_copy` of the model; not to be used afterwards.

    Raises:
        UnsupportedOperationError: other is no mixture, or its passes run in another part of the base model.
        ConfigurationError: as `refuse_taken`.
    """
    kind = _class_without(model)
    if type(other) is not kind:
        is_mixture = isinstance(vars(other)["_loramix"], MixtureState)
        raise UnsupportedOperationError(
            "The mixtures of a model route in the same part of the base model.",
            received=f"{name!r}, "
            + ("whose layers lie in another part" if is_mixture else "which is one LoRA expert, not a mixture"),
            remedy="load it on a base model of its own"
            if is_mixture
            else 'build a mixture of it, with router="static", and save that',
        )
    with _changing:
        refuse_taken(model, name)
        members, mixtures = _members(other), mixtures_of(model)
        if mixtures is not None:
            mixtures.members = {**mixtures.members, name: members}
            return
        first: str = cast(Any, model)._loramix.name
        vars(model)[_MIXTURES] = Mixtures({first: _members(model), name: members}, first)
        made_of = kind._loramix_made_of
        model.__class__ = specialise(made_of[0], SeveralMixtures, *made_of[1], **_options(made_of))
        rebind_forward(model)


def use(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Use a mixture in this thread; what is returned goes back to the one before, at the end of a `with`."""
    mixtures = mixtures_of(model)
    if mixtures is None:
        return nullcontext()
    before, mixtures.in_use = mixtures.in_use, name
    return mixtures.using(before, name)


def drop(model: nn.Module, name: str) -> None:
    """Drop a mixture that is not in use in this thread."""
    mixtures = mixtures_of(model)
    assert mixtures is not None
    with _changing:
        mixtures.members = {other: members for other, members in mixtures.members.items() if other != name}
        if mixtures.first == name:
            mixtures.first = mixtures.in_use
            vars(model).update(mixtures.current)


def base_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The base model without experts, in modules of its own, around the same weights.

    Copied are weights that the mixture in use has replaced, and buffers such as a batch norm's, which modules write.

    Raises:
        UnsupportedOperationError: weights of the base model that train, or that are offloaded.
    """
    state: AdaptedState = cast(Any, model)._loramix
    alone = _alone(model)
    replaced = {id(parameter) for parameter in replaced_parameters(alone, state)}
    constant = [tensor for tensor in _constant(alone) if id(tensor) not in replaced]
    kept: list[object] = [model, *(value for name, value in vars(alone).items() if name not in _OWN)]
    kept += [each for part in alone.modules() for each in vars(part).values() if isinstance(each, PreTrainedConfig)]
    kept += [state.log] if isinstance(state, MixtureState) else []
    memo: dict[Any, Any] = {id(each): each for each in (*constant, *kept)}
    # Some layers hold their weight a second time, in an object of their own.
    plain = [each.untyped_storage() for each in constant if type(each) in (Tensor, nn.Parameter)]
    memo["torch"] = {storage._cdata: storage for storage in plain}  # pyright: ignore[reportPrivateUsage]
    copied = copy.deepcopy(alone, memo)
    copied._loramix.thawed = []
    copied.unload()
    vars(copied)[SHARED] = True
    if any(parameter.requires_grad for parameter in copied.parameters()):
        raise _refused_weights("weights that require gradients", "freeze them, or load it on a base model of its own")
    return copied


def _constant(model: nn.Module) -> Iterator[Tensor]:
    """The parameters, and the buffers that are no module's memory.

    Raises:
        UnsupportedOperationError: they are offloaded.
    """
    for module in model.modules():
        if is_away(module):
            raise _refused_weights("weights that are offloaded", "load all mixtures, and offload the model then")
        yield from module.parameters(recurse=False)
        weights = is_quantised(module)
        yield from (each for each in module.buffers(recurse=False) if weights or not each.is_floating_point())


def _alone(model: PreTrainedModel) -> Any:
    """A root of its own around the modules of the mixture in use, without what accelerate has put on the model."""
    alone: Any = object.__new__(_class_without(model))
    of_accelerate = ("_hf_hook", "_old_forward", "forward", "_is_accelerate_prepared")
    vars(alone).update({key: value for key, value in vars(model).items() if key not in (*of_accelerate, _MIXTURES)})
    vars(alone).update(_members(model))
    return alone


def _members(model: Any) -> Members:
    return {name: getattr(model, name) for name in _OWN}


def _class_without(model: Any) -> Any:
    """The class of the model with one mixture alone."""
    made_of = type(model)._loramix_made_of
    first = [base for base in made_of[1] if base is not SeveralMixtures]
    return specialise(made_of[0], *first, **_options(made_of))


def _options(made_of: Any) -> dict[str, Any]:
    _, _, last, role, is_root = made_of
    return {"last": last, "role": role, "is_root": is_root}


def _refused_weights(received: str, remedy: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "Mixtures on one base model share weights that are constant, in memory.", received=received, remedy=remedy
    )


def refuse_several(model: Any, received: str) -> None:
    """Raises UnsupportedOperationError: a model with several mixtures."""
    mixtures = mixtures_of(model)
    if mixtures is not None and len(mixtures.members) > 1:
        raise UnsupportedOperationError(
            "What changes the base model, or runs it in threads of its own, is for a model with one mixture.",
            received=f"{received}: a model with {', '.join(map(repr, mixtures.members))}",
            remedy="call unload_mixture(…) for the others first, or unload() for all",
        )
