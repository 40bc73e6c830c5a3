"""The state that the passes of one model share: its live configuration, experts, router and latest scalings.

B, S: batch, sequence. H: hidden size. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.experts.adapter import Adapter
from loramix.experts.blocks import BlockMatrices
from loramix.experts.offload import refuse_training, with_weights
from loramix.layers.layer import XLoraLayer
from loramix.layers.routing import ConstantRouting, LayerRouting, Routing, TensorRouting
from loramix.layers.slot import ObservedPass, overriding
from loramix.layers.tokens import BaseUses, refuse_ambiguous
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.scalings_log import ScalingsLog
from loramix.routers.gating import Gating, gating_of
from loramix.routers.router import ConstantRouter, HiddenStateRouter, LayerRouter, Router, TextRouter


class RoutedPass(NamedTuple):
    """The routing of a mixture pass.

    Attributes:
        routing: the final scalings.
        activated: (B, S, L, E): the scalings before top-k, detached.
        losses: the losses that the hooks returned.
    """

    routing: TensorRouting
    activated: Tensor
    losses: list[Tensor]


class ReplacedRows(NamedTuple):
    """Rows of a parameter of the base model that the mixture has replaced.

    Attributes:
        rows: (n,) their numbers.
        values: (n, …) what they were before.
    """

    rows: Tensor
    values: Tensor


class PassSettings(NamedTuple):
    """The settings of a forward, which may change between two forwards."""

    gating: Gating
    scaling_pass_value: float
    global_scaling_weight: float
    hooks: tuple[RoutingHook, ...]
    logged: bool


class AdaptedState:
    """The state of a model with experts; in this class one expert, whose scaling is 1.

    Args:
        config: the model's own copy of the configuration.
        experts: name, configuration and source of each expert; their tensors live in the adapted layers.
        layers: the adapted layers by their paths, in order.
    """

    config: LoraConfig | XLoraConfig

    def __init__(
        self, config: LoraConfig | XLoraConfig, experts: Sequence[Adapter], layers: Mapping[str, XLoraLayer]
    ) -> None:
        self.config = config
        self.name = "default"  # among the mixtures of its model
        self.experts = [replace(expert, weights={}, base_weights={}) for expert in experts]
        self.saved_weights = {expert.name: list(expert.base_weights) for expert in experts}
        self.head: str | None = None  # the path of the model's head, if it is adapted
        self.replaced: dict[str, ReplacedRows] = {}  # of the base model's parameters
        self.paths = list(layers)
        self.blocks = {p.rpartition(".")[0] for p, each in layers.items() if isinstance(each.base_layer, BlockMatrices)}
        self.layouts = list({layer.stack.layout: layer.stack for layer in layers.values()}.values())
        self.owner = uuid.uuid4().hex
        self.enabled = True
        self.thawed: list[str] = []  # the base model's parameters that required gradients before

    @property
    def names(self) -> list[str]:
        """The experts, in the order of their scalings."""
        return [expert.name for expert in self.experts]

    def single_pass(self) -> Routing | ObservedPass | None:
        """The routing of a forward in which no scalings are made; None where they are."""
        if not self.enabled:
            return ConstantRouting(0.0)
        make = overriding(self)
        return make() if make is not None else self._fixed_pass()

    def _fixed_pass(self) -> Routing | None:
        return ConstantRouting(1.0)

    def apart(self, layer: int) -> Routing:
        """The routing of a layer that does not read that of a pass.

        Args:
            layer: its number.
        """
        given = self.single_pass()
        if given is None or isinstance(given, ObservedPass):  # of a session, which decodes ahead
            return self._routing_apart(layer)
        return given

    def _routing_apart(self, layer: int) -> Routing:
        raise AssertionError("one expert has one scaling everywhere")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled model is another model: it does not continue this one's caches."""
        self.__dict__.update(state, owner=uuid.uuid4().hex)


class MixtureState(AdaptedState):
    """The state of a mixture.

    Args:
        config: the model's own copy of the configuration.
        experts: name, configuration and source of each expert; their tensors live in the adapted layers.
        layers: the adapted layers by their paths, in order.
        router: its router.
        hidden_size: H of the base model.
        uses: what a dry run told of the base model.
    """

    config: XLoraConfig  # pyright: ignore[reportIncompatibleVariableOverride] - set once, here

    def __init__(
        self,
        config: XLoraConfig,
        experts: Sequence[Adapter],
        layers: Mapping[str, XLoraLayer],
        router: Router,
        hidden_size: int,
        uses: BaseUses,
    ) -> None:
        super().__init__(config, experts, layers)
        self.router = router
        self.hidden_size = hidden_size
        self.uses = uses
        self.log = ScalingsLog()
        self.measurements: dict[object, Any] = {}  # of decoding, by batch, device and dtype; see `decoding.scheduler`
        self.report: Any = None  # of the last generation
        self.new: tuple[str, ...] = ()  # experts that were made with the mixture, to train with its router
        self.fixed: Tensor | None = None  # the same final scalings for every token: (L or 1, E)
        self.fixed_after: int | None = None  # tokens of a generation after which each row's routing is fixed
        self.hooks: tuple[RoutingHook, ...] = ()
        self._latest: Tensor | None = None

    @property
    def needs_scaling_pass(self) -> bool:
        """Whether the router reads the last hidden states of a scaling pass."""
        return isinstance(self.router, HiddenStateRouter)

    @property
    def reads_text(self) -> bool:
        """Whether the router keeps, beside the cache, what it knows of the text so far."""
        return isinstance(self.router, TextRouter)

    @property
    def has_encoder(self) -> bool:
        """Whether scalings are made of an encoder's tokens as well as of its decoder's."""
        return bool(self.uses.seeing_encoder)

    @property
    def gating(self) -> Gating:
        """The gating of the live configuration."""
        return gating_of(self.config)

    def settings(self) -> PassSettings:
        """The settings of the next forward."""
        config = self.config
        return PassSettings(
            self.gating, config.scaling_pass_value, config.global_scaling_weight, self.hooks, self.log.enabled
        )

    def _fixed_pass(self) -> Routing | None:
        return None if self.fixed is None else self.routing(self.fixed)

    def _routing_apart(self, layer: int) -> Routing:
        """The scalings given for it, else those that the router makes without a scaling pass."""
        weight, given = self.config.global_scaling_weight, self.config.scalings_elsewhere(self.paths[layer])
        if given is not None:
            scalings = torch.tensor([given])
            for hook in self.hooks:
                scalings = hook.given(scalings)
            return TensorRouting(scalings, weight)
        router, gating = self.router, self.gating
        if isinstance(router, ConstantRouter):
            logits = self.changed_logits(with_weights(router, router.constant_logits), router.training)
            return self.routing(gating.select(gating.activate(logits)))
        if not isinstance(router, LayerRouter):
            raise ConfigurationError(
                "elsewhere keeps its entries: layers outside the backbone have no other scalings.",
                received=f"elsewhere={self.config.elsewhere!r}, without {self.paths[layer]!r}",
                remedy="change the scalings of an entry, not which layers have one",
            )

        def made(layer: int, low_rank: Tensor) -> Tensor:
            logits = with_weights(router, router.layer_logits, layer, low_rank.float()).unsqueeze(-2)
            logits = self.changed_logits(logits, router.training)
            return gating.select(gating.activate(logits)).squeeze(-2)

        return LayerRouting(made, weight)

    def routing(self, scalings: Tensor) -> TensorRouting:
        """The routing of a pass with these final scalings, its columns computed once a forward."""
        return TensorRouting(scalings, self.config.global_scaling_weight, self.layouts, self.uses.orders)

    def scaling_pass(self) -> Routing:
        """The routing of the scaling pass: every expert at `scaling_pass_value`, ungated."""
        return ConstantRouting(self.config.scaling_pass_value * self.config.global_scaling_weight)

    def check_settings(self) -> None:
        """Check the live configuration, which may have been changed by hand.

        Raises:
            ConfigurationError: it has become invalid.
        """
        if not torch.compiler.is_compiling():
            self.config.validate_for(len(self.experts), self.hidden_size)

    def recall(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The scaling pass's last hidden states, if a hook knows them."""
        found = (hook.recall(inputs) for hook in self.hooks)
        return next((hidden for hidden in found if hidden is not None), None)

    def keep(self, inputs: Mapping[str, Any], hidden: Float[Tensor, "B S H"]) -> None:
        """Show the scaling pass's last hidden states to the hooks."""
        for hook in self.hooks:
            hook.keep(inputs, hidden)

    def route(
        self, hidden: Float[Tensor, "B S H"], inputs: Mapping[str, Any], training: bool, of_encoder: bool = False
    ) -> RoutedPass:
        """The scalings of a mixture pass, from the last hidden states of its scaling pass, or from what it read.

        Args:
            hidden: the last hidden states, or summaries of the text.
            inputs: the arguments of the forward, as hooks see them.
            training: whether the model is in training mode.
            of_encoder: whether the tokens are those of an encoder that stands before a decoder.

        Raises:
            ConfigurationError: invalid settings, or hidden states of another width.
            RoutingError: sizes that do not tell whose tokens a layer sees.
        """
        self.check_settings()
        if not self.uses.told:
            refuse_ambiguous(hidden.shape[:2], inputs)
        assert isinstance(self.router, HiddenStateRouter | TextRouter)
        refuse_training(self.router)
        logits = self.changed_logits(with_weights(self.router, self.router.distinct, hidden), training)
        output = self.gated(logits, inputs, training, of_encoder)
        return RoutedPass(self.routing(output.final), output.activated.detach(), self.publish(output))

    def changed_logits(self, logits: Float[Tensor, "*tokens L E"], training: bool) -> Float[Tensor, "*tokens L E"]:
        """The logits to route by, after the hooks."""
        for hook in self.hooks:
            logits = hook.logits(logits, training)
        return logits

    def gated(
        self, logits: Float[Tensor, "B S L E"], inputs: Mapping[str, Any], training: bool, of_encoder: bool = False
    ) -> RouterOutput:
        """The scalings of these logits; arguments as for `route`."""
        gating = self.gating
        activated = gating.activate(logits)
        return RouterOutput(logits, activated, gating.select(activated), inputs, training, gating, of_encoder)

    def publish(self, output: RouterOutput) -> list[Tensor]:
        """Make these the latest scalings, log them and show them to the hooks. Returns the hooks' losses."""
        self._latest = output.activated.detach()
        self.log.add(output.activated, len(self.paths))
        losses = [hook.routed(output) for hook in self.hooks]
        return [loss for loss in losses if loss is not None]

    def set_latest(self, scalings: Float[Tensor, "B S #L E"]) -> None:
        """Set the latest scalings; for tokens computed ahead, those of the token being returned."""
        self._latest = scalings

    @property
    def latest(self) -> Float[Tensor, "B S L E"] | None:
        """The scalings of the last forward, before top-k, detached."""
        return None if self._latest is None else self._latest.expand(-1, -1, len(self.paths), -1)

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks, which belong to whoever attached them, and without measurements."""
        return self.__dict__ | {"hooks": (), "measurements": {}, "report": None}


_attaching = threading.Lock()


def state_of(model: Any) -> MixtureState:
    """The state of a mixture.

    Raises:
        UnsupportedOperationError: a model that makes no scalings.
    """
    state = model._loramix if "_loramix" in getattr(model, "__dict__", {}) else None
    if not isinstance(state, MixtureState):
        raise UnsupportedOperationError(
            "Only a mixture makes scalings.",
            received=f"a {type(model).__name__} without a router",
            remedy="pass the model that get_peft_model(base, XLoraConfig(…)) returned, not a wrapper around it",
        )
    return state


def attach(model: Any, hook: RoutingHook, *, alone: bool = False) -> Callable[[], None]:
    """Let a hook take part in a mixture's passes, until the returned function is called.

    Args:
        model: the mixture.
        hook: the hook.
        alone: replace other hooks of its class, which an interrupted run may have left.

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
    """Check that a model is a mixture that makes scalings at present.

    Raises:
        UnsupportedOperationError: it is not a mixture.
        RoutingError: a mixture that makes none at present.
    """
    if state_of(model).single_pass() is not None:
        raise RoutingError(
            "Only a mixture that routes each token makes scalings.",
            received="a model whose routing is fixed, or whose adapters are disabled",
            remedy="call unfix_routing(), and leave fixed_scalings(…) and disable_adapter() first",
        )


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Inside, the model is in evaluation mode; afterwards each module is back in its own."""
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
