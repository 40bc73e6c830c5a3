"""The reference that TRL's trainers make for a model with experts, where they are given none.

They load `create_model_from_path(get_config_model_id(model.config))`, which is the base model; only of a model of
PEFT's own class they take the model as it is at the start. TRL offers no place to say otherwise. So these two
functions are replaced in TRL's modules: for the model of a trainer, they give `create_reference_model(model)`. A
reference that follows its model (`sync_ref_model`) is averaged in place, without the weights that the two share.

This happens when `loramix.model` and TRL are both imported, in either order; nothing here imports TRL.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, cast

_policy: ContextVar[Callable[[], Any]] = ContextVar("loramix_policy", default=lambda: None)
"""The model of the trainer that was set up last, if it still exists."""


class _PolicyName(str):
    """The name of the base model of a trainer's own model, as its configuration says it."""

    policy: Any


def watch() -> None:
    """Change what TRL has imported, and what it will import."""
    for name in [name for name in _CHANGES if name in sys.modules]:
        _CHANGES.pop(name)(sys.modules[name])
    if _CHANGES:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Changes a module of TRL once the other finders have imported it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _CHANGES:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _AfterImport))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_execute, loader.exec_module)
        return spec


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    change = _CHANGES.pop(module.__name__, None)
    if change is not None:
        change(module)


def _change_utils(utils: ModuleType) -> None:
    from transformers import Trainer

    if not {"get_config_model_id", "create_model_from_path"} <= vars(utils).keys():
        warnings.warn(
            "loramix does not know how this TRL makes a reference: where a trainer takes one, "
            "pass ref_model=loramix.create_reference_model(model).",
            stacklevel=2,
        )
        return
    trainer = cast(Any, Trainer)
    trainer.__init__ = _noting_policy(trainer.__init__)
    for name, changed in (("get_config_model_id", _naming_policy), ("create_model_from_path", _creating_reference)):
        original = getattr(utils, name)
        function = changed(original)
        for path, module in list(sys.modules.items()):
            if path.startswith("trl.") and vars(module).get(name) is original:
                setattr(module, name, function)


def _noting_policy(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _policy.set(weakref.ref(self.model))

    return run


def _naming_policy(model_id: Callable[[Any], str]) -> Callable[[Any], str]:
    @functools.wraps(model_id)
    def run(config: Any) -> str:
        from loramix.model.peft_methods import PeftMethods

        name, policy = model_id(config), _policy.get()()
        if isinstance(policy, PeftMethods) and cast(Any, policy).config is config:
            name = _PolicyName(name)
            name.policy = policy
        return name

    return run


def _creating_reference(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def run(model_id: str, *args: Any, **kwargs: Any) -> Any:
        from loramix.model.reference import create_reference_model

        if isinstance(model_id, _PolicyName):
            return create_reference_model(model_id.policy)
        return create(model_id, *args, **kwargs)

    return run


def _change_callbacks(callbacks: ModuleType) -> None:
    callback = callbacks.SyncRefModelCallback
    callback.sync_target_model = staticmethod(_syncing_apart(callback.sync_target_model))


def _syncing_apart(sync: Callable[[Any, Any, float], None]) -> Callable[[Any, Any, float], None]:
    """The moving average of a reference, in place, skips the weights that it shares with the model."""

    @functools.wraps(sync)
    def run(model: Any, target_model: Any, alpha: float) -> None:
        pairs = list(zip(model.parameters(), target_model.parameters(), strict=True))
        apart = [(own, target) for own, target in pairs if own is not target]
        if len(apart) < len(pairs):
            model = SimpleNamespace(parameters=lambda: (own for own, _ in apart))
            target_model = SimpleNamespace(parameters=lambda: (target for _, target in apart))
        sync(model, target_model, alpha)

    return run


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "trl.trainer.utils": _change_utils,
    "trl.trainer.callbacks": _change_callbacks,
}
