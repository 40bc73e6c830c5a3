"""The two passes, in the backbone: first the scalings are made, then the mixture runs with them (SEMANTICS §2).

They live in the nearest `PreTrainedModel` above the adapted layers, the carrier, so that whoever calls the backbone
and the head separately gets the mixture too. The class of every model from the carrier up to the root becomes a
run-time subclass of itself with the original name (DESIGN, decisions 1 and 2).

B, S: batch, sequence. H: hidden size. L: adapted layers. E: experts.
"""

from __future__ import annotations

import functools
import inspect
import threading
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import CacheError, ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.experts.adapter import Adapter
from loramix.layers.layer import XLoraLayer
from loramix.layers.scalings import (
    ConstantRouting,
    Routing,
    TensorRouting,
    Watched,
    checkpoint_with,
    overriding,
    routed,
)
from loramix.passes.cache import TwoPassCache
from loramix.passes.hooks import EXPERT_IDS, Made, RoutingHook, given_expert_ids, join_gradient, takes_expert_ids
from loramix.passes.scalings_log import ScalingsLog
from loramix.routers.classifier import XLoraClassifier
from loramix.routers.gating import activate, select

CACHES = ("past_key_values", "cache_params")  # what models call the cache among the arguments and in the output
QUIET = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}


class Mixed(NamedTuple):
    """What a mixture pass runs with.

    Attributes:
        routing: the final scalings.
        activated: (B, S, L, E), L 1 where all layers share them: before top-k, detached.
        losses: the hooks'.
    """

    routing: TensorRouting
    activated: Tensor
    losses: list[Tensor]


class MixtureState:
    """What the passes of one model share: its live configuration, its router, and what it made last.

    Args:
        config: the model's own copy of the configuration.
        experts: name, configuration and source of each expert; their tensors live in the adapted layers.
        layers: the adapted layers by their paths, in order.
        classifier: the router; None for a plain LoRA model, whose one expert has the scaling 1.
    """

    def __init__(
        self,
        config: XLoraConfig | LoraConfig,
        experts: Sequence[Adapter],
        layers: Mapping[str, XLoraLayer],
        classifier: XLoraClassifier | None,
    ) -> None:
        self.config = config
        self.experts = [replace(expert, weights={}, base_weights={}) for expert in experts]
        self.paths = list(layers)
        self.layouts = list({layer.layout: layer for layer in layers.values()}.values())
        self.classifier = classifier
        self.owner = uuid.uuid4().hex
        self.enabled = True
        self.thawed: list[str] = []  # the base model's parameters that required gradients before
        self.log = ScalingsLog()
        self.paces: dict[object, Any] = {}  # what lockstep has learnt of its speed, by batch, device and dtype
        self.report: Any = None  # of the last generation
        self.draft_head: Any = None  # what lockstep guesses with, made at its first use
        self.fixed: Tensor | None = None  # the same final scalings for every token: (L or 1, E)
        self.fixed_after: int | None = None  # tokens of a generation after which each row keeps what it has
        self.hooks: tuple[RoutingHook, ...] = ()
        self._latest: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """The experts, in the order of their scalings."""
        return [expert.name for expert in self.experts]

    def single_pass(self) -> Routing | Watched | None:
        """The routing for one pass, where no scalings are to be made: disabled, fixed, or a plain LoRA model."""
        if not self.enabled:
            return ConstantRouting(0.0)
        override = overriding(self)
        if override is not None:
            return override()
        if self.fixed is not None:
            return self.routing(self.fixed)
        return ConstantRouting(1.0) if self.classifier is None else None

    def routing(self, scalings: Tensor) -> TensorRouting:
        """The routing of a pass with these final scalings, its columns computed once a forward."""
        return TensorRouting(scalings, cast(XLoraConfig, self.config).global_scaling_weight, self.layouts)

    def scaling_pass(self) -> Routing:
        """The routing of the scaling pass: every expert at `scaling_pass_value`, ungated."""
        assert isinstance(self.config, XLoraConfig)
        return ConstantRouting(self.config.scaling_pass_value * self.config.global_scaling_weight)

    def recall(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The scaling pass's last hidden states, where a hook knows them."""
        found = (hook.recall(inputs) for hook in self.hooks)
        return next((hidden for hidden in found if hidden is not None), None)

    def keep(self, inputs: Mapping[str, Any], hidden: Float[Tensor, "B S H"]) -> None:
        """Show them to the hooks."""
        for hook in self.hooks:
            hook.keep(inputs, hidden)

    def mixture_pass(self, hidden: Float[Tensor, "B S H"], inputs: Mapping[str, Any], training: bool) -> Mixed:
        """What the mixture pass runs with, from the scaling pass's last hidden states."""
        config, classifier = self.config, self.classifier
        assert isinstance(config, XLoraConfig)
        assert classifier is not None
        if not torch.compiler.is_compiling():
            config.validate_for(len(self.experts), classifier.hidden_size)  # it may have been changed by hand
        logits = classifier.distinct(hidden)
        for hook in self.hooks:
            logits = hook.logits(logits, training)
        scalings = activate(logits, softmax=config.enable_softmax, temperature=config.softmax_temperature)
        self._latest = scalings.detach()
        self.log.add(scalings, len(self.paths))
        final = select(scalings, top_k=config.top_k_lora, renormalise=config.enable_softmax_topk)
        made = Made(logits, scalings, final, inputs, training)
        losses = [hook.made(made) for hook in self.hooks]
        return Mixed(self.routing(final), scalings.detach(), [loss for loss in losses if loss is not None])

    def show(self, scalings: Float[Tensor, "B S #L E"]) -> None:
        """Let these be the scalings of the last forward: of tokens that were read ahead, those that are served."""
        self._latest = scalings

    def __getstate__(self) -> dict[str, Any]:
        """Hooks belong to whoever attached them; they do not travel, and neither does what was measured on the way."""
        return self.__dict__ | {"hooks": (), "paces": {}, "report": None, "draft_head": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled, is another model: it does not continue this one's caches."""
        self.__dict__.update(state, owner=uuid.uuid4().hex)

    @property
    def latest(self) -> Float[Tensor, "B S L E"] | None:
        """The scalings of the last forward, before top-k, detached."""
        return None if self._latest is None else self._latest.expand(-1, -1, len(self.paths), -1)


_attaching = threading.Lock()


def state_of(model: Any) -> MixtureState:
    """What the passes of a mixture share.

    Raises:
        UnsupportedOperationError: a model that makes no scalings.
    """
    state = getattr(model, "__dict__", {}).get("_loramix")
    if not isinstance(state, MixtureState) or state.classifier is None:
        raise UnsupportedOperationError(
            "Only a mixture makes scalings.",
            received=f"a {type(model).__name__} without a router",
            remedy="pass the model that get_peft_model(base, XLoraConfig(…)) returned, not a wrapper around it",
        )
    return state


def attach(model: Any, hook: RoutingHook, *, alone: bool = False) -> Callable[[], None]:
    """Let a hook take part in a mixture's passes, until the function that is returned is called.

    Args:
        model: the mixture.
        hook: what takes part.
        alone: in the place of others of its class, which something that was interrupted has left.

    Raises:
        UnsupportedOperationError: a model that makes no scalings.
    """
    state = state_of(model)
    with _attaching:
        others = state.hooks if not alone else tuple(other for other in state.hooks if type(other) is not type(hook))
        state.hooks = (*others, hook)

    def detach() -> None:
        with _attaching:
            state.hooks = tuple(other for other in state.hooks if other is not hook)

    return detach


def require_routing(model: Any) -> None:
    """Let a mixture pass that makes scalings now.

    Raises:
        UnsupportedOperationError: a model that makes none.
        RoutingError: a mixture that makes none now.
    """
    if state_of(model).single_pass() is not None:
        raise RoutingError(
            "Only a mixture that routes each token makes scalings.",
            received="a model whose routing is fixed, or whose adapters are disabled",
            remedy="call unfix_routing(), and leave fixed_scalings(…) and disable_adapter() first",
        )


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, or in its output; None where there is none."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Inside, the model is in evaluation mode; then each module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def observing(model: nn.Module, hook: RoutingHook) -> Generator[None]:
    """Inside, the hook takes part, and the model is in evaluation mode."""
    detach = attach(model, hook)
    try:
        with evaluating(model):
            yield
    finally:
        detach()


class RoutedCheckpointing:
    """Mixin of every model from the carrier up: gradient checkpointing that recomputes with the routing of its time."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        function = _routed_checkpoint(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **options)  # pyright: ignore

    def enable_input_require_grads(self) -> None:
        """Nothing to do: only re-entrant checkpointing needs inputs with gradients."""


def route_checkpoints(model: nn.Module, *, dry_run: bool = False) -> None:
    """The same for a model whose checkpointing was switched on before its experts came.

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
            "A mixture checkpoints gradients without re-entering autograd.",
            received="gradient_checkpointing_kwargs={'use_reentrant': True}",
            remedy="pass gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    return functools.partial(checkpoint_with, functools.partial(function, use_reentrant=False))


def two_passes(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The carrier's forward: a scaling pass without gradients, then the mixture pass, each with a cache of its own.

    Raises (the result):
        CacheError: a cache that this mixture did not fill.
    """
    parameters = inspect.signature(forward).parameters
    named = tuple(parameters)[1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    quiet = {key: value for key, value in QUIET.items() if takes_any or key in parameters}
    its_cache = next((name for name in CACHES if name in parameters), CACHES[0])

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: MixtureState = self._loramix
        kwargs |= dict(zip(named, args, strict=False))
        expert_ids = kwargs.pop(EXPERT_IDS, given_expert_ids())
        single = state.single_pass()
        if single is not None:
            refuse_two_pass_cache(kwargs.get(its_cache))
            if not isinstance(single, Watched):
                return routed(single, forward, self, **kwargs)
            out = routed(single.routing, forward, self, **kwargs)
            single.hidden = out.last_hidden_state
            if single.rows is not None:
                out.last_hidden_state = out.last_hidden_state[single.rows]
            return out

        cache = None if kwargs.get(its_cache) is None else TwoPassCache.adopt(kwargs[its_cache], state.owner)
        first = kwargs | quiet
        if cache is not None:
            first[its_cache] = cache.base
            cache.torn = True
        elif self.training and torch.is_grad_enabled() and kwargs.get("use_cache") is not True:
            first["use_cache"] = False  # nobody continues the cache of a training step
            kwargs["use_cache"] = False
        known = cache is None and first.get("use_cache") is False  # a training step: its texts come again
        hidden = state.recall(first) if known else None
        made: Any = None
        if hidden is None:
            with torch.no_grad():
                made = routed(state.scaling_pass(), forward, self, **first)
            hidden = made.last_hidden_state
            if known:
                state.keep(first, hidden)
        inputs = kwargs if expert_ids is None else kwargs | {EXPERT_IDS: expert_ids}
        routing, _, losses = state.mixture_pass(hidden, inputs, self.training)
        out = routed(routing, forward, self, **(kwargs | ({"return_dict": True} if "return_dict" in quiet else {})))
        if losses and torch.is_grad_enabled():
            out.last_hidden_state = join_gradient(out.last_hidden_state, torch.stack(losses).sum())
        if cache is not None:
            cache.torn = False
        elif made is not None and made.get(its_cache) is not None and out.get(its_cache) is not None:
            pair = TwoPassCache.pair(out[its_cache], made[its_cache], state.owner)
            for hook in state.hooks:
                hook.cached(pair)
        return as_asked(out, kwargs.get("return_dict", getattr(self.config, "return_dict", True)))

    return run


def as_asked(out: ModelOutput, return_dict: bool | None) -> Any:
    """A tuple if the caller asked for one."""
    return out.to_tuple() if return_dict is False else out


def refuse_two_pass_cache(cache: Cache | None) -> None:
    """Raises CacheError: a cache of two passes where only one is made, unless it is empty: then it becomes plain."""
    if isinstance(cache, TwoPassCache) and cache.is_empty:
        cache.separate()
    if isinstance(cache, TwoPassCache):
        raise CacheError(
            "A cache is continued the way it was filled.",
            received="a cache of the mixture's two passes, with adapters disabled or scalings fixed",
            remedy="pass an empty cache to the model inside the context manager",
        )


@functools.cache
def specialise(kind: type, *mixins: type, carrier: bool) -> type:
    """The run-time subclass of a model class: the same names, so that what is keyed by them still finds it.

    Args:
        kind: the model's class.
        mixins: what comes before it in the resolution order, at the root of the model.
        carrier: whether the two passes run here.
    """
    body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    body["_loramix_made_of"] = (kind, mixins, carrier)
    if carrier:
        body["forward"] = two_passes(cast(Any, kind).forward)
    if mixins:
        body["forward"] = takes_expert_ids(body.get("forward", cast(Any, kind).forward))
    return type(kind.__name__, (*mixins, Specialised, RoutedCheckpointing, kind), body)


def rebind_forward(model: Any) -> None:
    """Let a hook of accelerate, which holds the forward that it wraps, hold that of the model's class as it is now."""
    if "_old_forward" in model.__dict__:
        model.__dict__["_old_forward"] = MethodType(type(model).forward, model)


class Specialised:
    """Mixin of every run-time subclass: what it was made of, to be made again by pickle, or undone."""

    _loramix_made_of: ClassVar[tuple[type, tuple[type, ...], bool]]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The base class's own: a new, plain base model."""
        return cast(Any, cls._loramix_made_of[0]).from_pretrained(*args, **kwargs)

    def restore(self) -> None:
        """Become an instance of the model's own class again."""
        del self.__dict__["_loramix"]
        self.__class__ = self._loramix_made_of[0]
        rebind_forward(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._loramix_made_of, self.__dict__


def _rebuild(kind: type, mixins: tuple[type, ...], carrier: bool) -> Any:
    special: Any = specialise(kind, *mixins, carrier=carrier)
    return special.__new__(special)
