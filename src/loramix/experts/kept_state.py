"""What a base model's forward keeps outside the cache that it is given.

The two passes of a mixture each have a cache. What a forward keeps elsewhere, in its modules or in a state that it
returns, they would share. It is found wherever it is kept: the model reads a text of NaN, then continues another text
with a cache of its own. If that gives NaN, the first text has reached the second outside the cache.

B, S: batch, sequence.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from loramix._compat import CACHES
from loramix.experts.base_model import text_config

STATES = ("state", "mems", "past_buckets_states")
"""Other names than a cache's by which models of transformers take what an earlier forward returned."""
IDS = ("decoder_input_ids", "input_ids")
TEXT_INPUTS = ("input_ids", "inputs_embeds", "hidden_states")
"""Arguments that hold one vector, or one number, for each token."""


@dataclass(frozen=True)
class KeptState:
    """What a forward keeps outside the cache.

    Attributes:
        fields: of its output, for the next forward: a state, memories, a cache that is no `Cache`.
        in_modules: whether a forward with a cache depends on what another one left in the model.
        always: whether every forward does.
    """

    fields: tuple[str, ...] = ()
    in_modules: bool = False
    always: bool = False

    @staticmethod
    def by_names(model: PreTrainedModel) -> KeptState:
        """The state that the names of the forward's arguments show."""
        return KeptState(tuple(name for name in STATES if name in _names(model)))

    @property
    def is_any(self) -> bool:
        """Whether there is such state when a cache is used."""
        return bool(self.fields) or self.in_modules


@dataclass
class Watch:
    """What the watched layers of a copy do in a forward, beside what they compute.

    Attributes:
        poisoned: embeddings give NaN.
        stage: of what they note: a whole text, the same with a marked token, a longer one, the next token with a cache,
            or nothing.
        marked_id: the token that is marked, where texts are given by number.
    """

    poisoned: bool = False
    stage: Literal["whole", "marked", "longer", "continued", "none"] = "whole"
    marked_id: int = -1


def kept_state(model: PreTrainedModel, inputs: Mapping[str, Any], whole: Any, watch: Watch) -> KeptState:
    """What the forward of a copy keeps outside the cache.

    Args:
        model: the copy, whose layers hand NaN on. It may be left with NaN in it.
        inputs: arguments that it takes, with `use_cache=False` where it knows that argument.
        whole: its output for them.
        watch: what its layers do.
    """
    watch.stage = "none"
    found = KeptState.by_names(model)
    if "use_cache" in inputs and not inputs.keys().isdisjoint(TEXT_INPUTS):
        for make in (_empty_cache, _no_cache):
            try:
                found = _with_cache(model, inputs, whole, make(model), watch)
                break
            except Exception:  # the model refuses this cache, or a text that goes on, in a way of its own
                watch.stage = "none"
    watch.stage = "none"
    try:
        _run(model, inputs, watch, poisoned=True)
        always = _is_poisoned(_run(model, inputs, watch)) and not _is_poisoned(whole)
    except Exception:  # likewise, NaN
        return found
    return replace(found, always=always)


def _with_cache(model: PreTrainedModel, inputs: Mapping[str, Any], whole: Any, cache: Any, watch: Watch) -> KeptState:
    """The state that forwards with a cache keep; `cache` is the one to fill, None if the model makes its own."""
    start, other = ({**inputs, "use_cache": True, **_given(model, each)} for each in (cache, copy.deepcopy(cache)))
    first = _run(model, start, watch)
    made = next((first[name] for name in CACHES if isinstance(first.get(name), Cache)), cache)
    watch.stage = "continued" if _given(model, made) else "none"
    going_on = _run(model, {**_next_token(start), **_given(model, copy.deepcopy(made))}, watch)
    watch.stage = "none"
    returned = (name for name in first if whole.get(name) is None and not isinstance(first[name], Cache))
    fields = tuple(dict.fromkeys((*KeptState.by_names(model).fields, *returned)))
    if _is_poisoned(going_on) or not _is_poisoned(_run(model, other, watch, poisoned=True)):
        return KeptState(fields)
    last = _run(model, {**_next_token(start), **_given(model, made)}, watch)
    return KeptState(fields, in_modules=_is_poisoned(last))


def _empty_cache(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=text_config(model.config))


def _no_cache(model: PreTrainedModel) -> None:
    """No cache: the model makes its own."""


def _given(model: PreTrainedModel, cache: Cache | None) -> dict[str, Any]:
    """The cache as an argument, by the name that the model has for it."""
    return {} if cache is None else {name: cache for name in CACHES if name in _names(model)}


def _names(model: PreTrainedModel) -> Collection[str]:
    return inspect.signature(type(model).forward).parameters


def _next_token(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One more token of each text."""
    found = {name: value[:, :1] if name in TEXT_INPUTS else value for name, value in inputs.items()}
    return found | {name: _one_more(value) for name, value in inputs.items() if name == "attention_mask"}


def longer(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Texts that are one token longer."""
    names = (*TEXT_INPUTS, *IDS, "attention_mask")
    return {name: _one_more(value) if name in names else value for name, value in inputs.items()}


def _one_more(value: Tensor) -> Tensor:
    return torch.cat([value, value[:, :1]], 1)


def _run(model: PreTrainedModel, inputs: Mapping[str, Any], watch: Watch, *, poisoned: bool = False) -> Any:
    watch.poisoned = poisoned
    try:
        return run_copy(model, {name: _poison(value) if poisoned else value for name, value in inputs.items()})
    finally:
        watch.poisoned = False


def run_copy(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """A forward of a copy, without gradients, in which no large weight is written to: it takes no memory."""
    with torch.no_grad(), _Unwritten():
        return model(**inputs)


class _Unwritten(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        written = args[0] if args and in_place else None
        hollow = isinstance(written, nn.Parameter) and 0 in written.stride()
        return written if hollow else func(*args, **(kwargs or {}))


def _poison(value: Any) -> Any:
    return value * float("nan") if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_poisoned(out: Any) -> bool:
    return bool(out.last_hidden_state.isnan().any())
