"""What makes logits: the contract of routers, and the registry of their kinds (docs/architecture.md, "A router").

A mixture is experts, a router and a gating. The router makes logits, the gating makes scalings of them, and the layers
mix the experts by the scalings. There are three families:

- A `HiddenStateRouter` reads the last hidden state of a scaling pass: two passes, and two caches in generation.
- A `LayerRouter` reads what a layer computes anyway, its low-rank activation h = A x, or nothing at all: one pass, with
  the base model's own cache.
- A `TextRouter` reads the input embeddings of the text so far: one pass, with the logits known before it begins.

B, S: batch, sequence. H: hidden size. L: adapted layers. E: experts. R: total rank of a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from loramix._registry import Registry
from loramix.config.xlora import XLoraConfig
from loramix.errors import AdapterMismatchError, ConfigurationError, UnsupportedOperationError
from loramix.experts.adapter import LoraWeights
from loramix.routers.gating import Gating
from loramix.routers.precision import keep_dtype
from loramix.routers.start import ClosedForm, LinearRouter, Method, Moments

Reads = Literal["hidden state", "input embeddings", "low-rank activation", "nothing"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RouterSizes:
    """What a router is built for.

    Args:
        hidden_size: H.
        layers: L.
        experts: E.
        expert_of_rank: for each layer the expert of each of its R rank columns; empty where the layers are not known,
            as when a file is described without its base model.
    """

    hidden_size: int
    layers: int
    experts: int
    expert_of_rank: tuple[tuple[int, ...], ...] = ()


class Router(nn.Module, ABC):
    """A router of any kind. It is a module of the model, under the name `attribute`.

    Parameters and computation are float32, whatever the base model's dtype.

    Attributes:
        kind: what `XLoraConfig.router` says.
        reads: what the logits depend on.
        attribute: the router's name in the model and, after "base_model.", in its file.
        trains: whether it has parameters. What is made from the experts alone has buffers, which are saved as well.
    """

    kind: ClassVar[str]
    reads: ClassVar[Reads]
    trains: ClassVar[bool] = True
    attribute: ClassVar[str] = "internal_xlora_router"

    @classmethod
    @abstractmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        """A new router, at its start."""

    @classmethod
    @abstractmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        """Its tensors by name, with their shapes: what is saved, loaded, checked and counted.

        The names are the same for every number of layers.
        """

    @classmethod
    def check(cls, config: XLoraConfig) -> None:
        """Refuse settings that mean nothing for this kind.

        Raises:
            ConfigurationError: naming the setting.
        """

    @classmethod
    def describe(cls, config: XLoraConfig) -> Mapping[str, Any]:
        """What `loramix info` says of it beside its kind and size: names and values, in JSON's types."""
        return {}

    @classmethod
    def check_start(cls, config: XLoraConfig, experts: int, method: Method) -> None:
        """Check that a router of this kind can be given a start, before it is built.

        Raises:
            ConfigurationError: it has none, or not with these settings.
        """
        raise ConfigurationError(
            "A router is started by its kind.",
            received=f"router={cls.kind!r}, which has no start of its own",
            remedy="train it from where it is, or set its weights by its own methods",
        )

    def start_uniform(self, gating: Gating) -> None:
        """Give every expert the same scaling, for every token; called where `check_start` raised nothing."""
        raise NotImplementedError

    def start_from(self, moments: Sequence[Moments], method: ClosedForm, gating: Gating) -> LinearRouter:
        """Start from labelled tokens, in closed form; called where `check_start` raised nothing.

        Args:
            moments: of what the router reads: of the hidden states or input embeddings, one; of low-rank activations,
                one a layer; of nothing, one without features.
            method: how.
            gating: what makes scalings of the logits.

        Returns:
            The linear map that the router now computes; of several, that of the first layer.
        """
        raise NotImplementedError

    def follow(self, experts: Sequence[Mapping[int, LoraWeights]]) -> None:
        """Compute what follows from the experts' tensors; nothing here.

        It is called once they are in the layers: of a new router, and of a loaded one whose experts were replaced.
        Otherwise a loaded router has what was saved.

        Args:
            experts: for each layer the tensors of the experts that adapt it, by number.
        """

    @classmethod
    def expert_axes(cls, config: XLoraConfig, layers: int) -> dict[str, int]:
        """Where the experts lie, for edits of a mixture: tensor -> the axis of the experts; others have no entry.

        An axis of layers and experts holds the experts of each layer beside each other (L · E). The axes follow from
        `shapes`. A kind where the logit of an expert depends on the others, though its shapes do not show it, overrides
        this and raises.

        Args:
            config: the configuration.
            layers: L.

        Raises:
            UnsupportedOperationError: the experts cannot be told apart in the tensors.
        """

        def shapes(experts: int, ranks: int) -> Shapes:
            columns = tuple(expert for expert in range(experts) for _ in range(ranks))
            return cls.shapes(config, RouterSizes(config.hidden_size, layers, experts, (columns,) * layers))

        few, more, wider = shapes(_FEW, 1), shapes(_FEW + 1, 1), shapes(_FEW, 2)
        axes: dict[str, int] = {}
        for name, shape in few.items():
            found = [axis for axis, size in enumerate(shape) if more[name][axis] != size]
            if len(found) > 1 or wider[name] != shape or any(shape[axis] % _FEW for axis in found):
                raise UnsupportedOperationError(
                    "Experts are edited one by one where the logit of an expert depends on that expert alone.",
                    received=f"router={cls.kind!r}, whose {name!r} holds all experts together",
                    remedy="build a mixture of the experts that you want, and fit or train its router again",
                )
            axes.update((name, axis) for axis in found)
        return axes

    @classmethod
    def cold_expert(
        cls,
        config: XLoraConfig,
        columns: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        share: float,
        offset: float,
    ) -> dict[str, Tensor]:
        """The tensors of a new expert with the logit share · (mean logit of the others) + offset, for every token.

        Args:
            config: the configuration.
            columns: the others' tensors, with the experts along the last axis (`expert_axes`).
            rest: the tensors that hold no experts.
            share: 1 or 0.
            offset: what is added.

        Returns:
            Tensors of the same names, without the last axis.

        Raises:
            UnsupportedOperationError: a kind that does not say how.
        """
        raise UnsupportedOperationError(
            "A new expert changes nothing where its logit can be kept low.",
            received=f"router={cls.kind!r}, which does not say how",
            remedy="give the expert's tensors (column=), or build a new mixture and fit or train its router",
        )

    def load(self, saved: Mapping[str, Tensor], replaced: Collection[int] = ()) -> None:
        """Take over saved tensors.

        Args:
            saved: the tensors.
            replaced: the numbers of the experts that are others now than when it was saved; `follow` comes next.

        Raises:
            AdapterMismatchError: they are not those of this router: other names or shapes.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        if own != found:
            raise AdapterMismatchError(
                "A saved router fits the base model's hidden size, its adapted layers and the experts.",
                received=f"expected {own}, found {found}",
                remedy="load it on the base model it was trained on, with as many experts on the same modules",
            )
        self.load_state_dict(dict(saved))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_dtype(fn), recurse)


class HiddenStateRouter(Router):
    """A router that reads the last hidden state of a scaling pass."""

    reads = "hidden state"

    @abstractmethod
    def distinct(self, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S distinct E"]:
        """Logits; the third dimension is L, or 1 where all layers share them.

        Raises:
            ConfigurationError: hidden states of another width.
        """

    def start_from(self, moments: Sequence[Moments], method: ClosedForm, gating: Gating) -> LinearRouter:
        found = moments[0].fit(method, gating)
        self.set_linear(found)
        return found

    def set_linear(self, router: LinearRouter) -> None:
        """Compute this linear map of the hidden state, the same in every layer."""
        raise NotImplementedError


class TextRouter(Router):
    """A router that reads the input embeddings of the text so far, in one pass.

    It makes a summary of the text at each token, which goes on from that of the token before. The summaries lie beside
    the base model's cache.
    """

    reads = "input embeddings"

    @abstractmethod
    def read(
        self,
        embeddings: Float[Tensor, "B S H"],
        real: Bool[Tensor, "B S"],
        first: Bool[Tensor, "B S"],
        before: Float[Tensor, "B F"] | None,
    ) -> Float[Tensor, "B S F"]:
        """The summary of the text up to each token.

        Args:
            embeddings: x / rms(x) of each token, x its embedding as it enters the base model, in float32.
            real: False at padding, which changes nothing.
            first: the first tokens of further texts in a row: what stands before them does not count.
            before: the summary at the token before; None at the beginning.

        Raises:
            ConfigurationError: embeddings of another width.
        """

    @abstractmethod
    def distinct(self, read: Float[Tensor, "B S F"]) -> Float[Tensor, "B S distinct E"]:
        """Logits from summaries; the third dimension is L, or 1 where all layers share them."""

    @classmethod
    def check(cls, config: XLoraConfig) -> None:
        _refuse_scaling_pass(cls, config)


class LayerRouter(Router):
    """A router that makes its logits inside each layer, in one pass.

    `scaling_pass_value` means nothing here and is refused when it is set; `hidden_size` is the base model's.
    """

    reads = "low-rank activation"

    @abstractmethod
    def layer_logits(self, layer: int, low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens E"]:
        """The logits of one layer.

        Args:
            layer: its number among the adapted layers.
            low_rank: h = A x before any gate, without the columns of LoRA biases.
        """

    def for_pass(self) -> Callable[[int, Tensor], Tensor]:
        """`layer_logits` for the layers of one pass, with what does not depend on the text computed once."""
        return self.layer_logits

    @classmethod
    def check(cls, config: XLoraConfig) -> None:
        _refuse_scaling_pass(cls, config)


def _refuse_scaling_pass(kind: type[Router], config: XLoraConfig) -> None:
    if config.scaling_pass_value != 0.0:
        raise ConfigurationError(
            f"scaling_pass_value belongs to a scaling pass, and router={kind.kind!r} needs none.",
            received=f"scaling_pass_value={config.scaling_pass_value!r}",
            remedy="leave scaling_pass_value out",
        )


class ConstantRouter(LayerRouter):
    """A router whose logits do not depend on the text: they are known before the pass begins."""

    reads = "nothing"

    @abstractmethod
    def constant_logits(self) -> Float[Tensor, "distinct E"]:
        """The logits of all tokens, with gradients where they train; the first dimension is L, or 1."""

    def layer_logits(self, layer: int, low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens E"]:
        logits = self.constant_logits()
        own = logits[layer if len(logits) > 1 else 0]
        return own.expand(*low_rank.shape[:-1], -1)


_FEW = 3
"""A number of experts to ask for shapes with; of the axes that grow with it, all experts' sizes are multiples."""
_ROUTERS = Registry[type[Router]]("router", "loramix.routers.register_router")


R = TypeVar("R", bound=Router)


def register_router(kind: type[R]) -> type[R]:
    """Let `XLoraConfig.router` name a kind of router; usable as a decorator.

    Raises:
        ConfigurationError: its name is taken by another kind.
    """
    _ROUTERS.add(kind.kind, kind)
    return kind


def router_kinds() -> list[type[Router]]:
    """All registered kinds of router, in the order of their registration."""
    return list(_ROUTERS.values())


def router_class(config: XLoraConfig) -> type[Router]:
    """The kind of router that a configuration names.

    Raises:
        ConfigurationError: it names none that is registered, or has settings that mean nothing for it.
    """
    kind = _ROUTERS[config.router]
    kind.check(config)
    return kind
