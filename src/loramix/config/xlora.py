"""The configuration of a mixture: its experts, its router and its gating."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast, no_type_check

from loramix.config.base import PeftConfig, PeftType, as_own
from loramix.config.checks import (
    require,
    require_finite,
    require_integer,
    require_probability,
    require_switch,
    warn,
)
from loramix.config.lora import LoraConfig
from loramix.config.names import check_expert_names
from loramix.errors import ConfigurationError

_NOT_GIVEN = cast(Any, None)


class _AssumedSize(int):
    """A default hidden size; its type survives copying, replacing and pickling."""

    def __repr__(self) -> str:
        return str(int(self))


@no_type_check
@dataclass
class XLoraConfig(PeftConfig, reads=[PeftType.XLORA, PeftType.LORAMIX]):
    """A mixture: its experts, the router that makes logits, and the gating that makes scalings of them.

    X-LoRA's router, the classifier, maps the base model's last hidden state h (B, S, H) to logits z; its gating maps
    these to scalings s (B, S, L, E): s = softmax(z / softmax_temperature) with `enable_softmax`, else z; with
    `top_k_lora` all but the k largest become 0; with `enable_softmax_topk` a softmax over those that are left.

    A mixture with another router, gating or classifier than PEFT's, or with scalings given `elsewhere`, has `peft_type`
    LORAMIX, in its file too, so that PEFT refuses it rather than run it with a classifier drawn at random.

    Args:
        hidden_size: H, the base model's hidden size; if it is left out, it is set when the model is built.
        adapters: name -> local folder or Hub identifier, in the order of the experts; or a `LoraConfig`: a new expert,
            which adds nothing at its start and trains with the router. One of PEFT's is read by its fields.
        enable_softmax: softmax over all experts.
        enable_softmax_topk: softmax over the selected experts.
        layerwise_scalings: whether each adapted layer has its own scalings; otherwise all share them.
        xlora_depth: number of linear layers of the classifier, at least 1.
        xlora_size: width of the classifier's hidden layers, at least 1; used with depth > 1.
        xlora_dropout_p: the classifier's dropout probability, in [0, 1); used with depth > 1.
        use_trainable_adapters: whether the experts that exist are trained too; new ones train in any case. The model's
            own configuration says True if all experts are new: saved and loaded, they train on together.
        softmax_temperature: temperature of the softmax over all experts, positive; lower is sharper.
        top_k_lora: number of experts selected for each token, from 1 to E; None selects all.
        scaling_pass_value: every expert's scaling in the scaling pass.
        global_scaling_weight: factor on the experts' contribution to every layer.
        router: kind of router. `xlora_depth`, `xlora_size`, `xlora_dropout_p` and the last two are settings of
            "classifier"; other kinds refuse them.
        gating: kind of gating.
        gating_settings: settings of a registered gating by name: numbers, texts, True, False or None. Those of "xlora"
            are the fields above.
        elsewhere: given scalings for layers that the router cannot scale, such as those of a vision tower: part of a
            path, such as "vision_tower" or "decoder.embed_positions", -> expert -> scaling, 0 for experts that are left
            out; or "uniform", 1 / E for each. Of several parts that fit a layer the longest counts.
        use_bias: whether the classifier's linear layers have biases, as in PEFT; the original library can do without.
        enable_relu_and_dropout: whether ReLU and dropout stand between these layers, likewise.

    Raises:
        ConfigurationError: an invalid value, whatever the base model is.
        AdapterNameError: an expert's name that cannot be the name of a folder, or two names that clash.

    Source: X-LoRA, arXiv 2402.07148, section 2; PEFT 0.21.2, `tuners/xlora/config.py`.
    """

    hidden_size: int = _NOT_GIVEN
    adapters: dict[str, Any] = _NOT_GIVEN
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    router: str = "classifier"
    gating: str = "xlora"
    gating_settings: dict[str, Any] = field(default_factory=dict)
    elsewhere: dict[str, Any] = field(default_factory=dict)
    use_bias: bool = True
    enable_relu_and_dropout: bool = True

    def __post_init__(self) -> None:
        missing_adapters = cast(object, self.adapters) is None
        if cast(object, self.hidden_size) is None:
            self.hidden_size = _AssumedSize(4096)
            # Not every other router reads the hidden state, and those that do take the base model's size.
            if self.router == _CLASSIFIER:
                warn("hidden_size was not given: the base model's is taken when the model is built, 4096 until then.")
        if missing_adapters:
            warn("adapters was not given: this mixture has no experts yet.")
        self.adapters = {} if missing_adapters else as_adapters(self.adapters, new=True)
        for name in _SWITCHES:  # null is off to PEFT, whatever the default
            setattr(self, name, False if getattr(self, name) is None else getattr(self, name))
        super().__post_init__()
        self._warn_about_gating()

    @property
    def peft_type(self) -> PeftType:
        """XLORA, or LORAMIX with what PEFT does not have; it follows from the fields."""
        return PeftType.LORAMIX if self._beyond_peft() else PeftType.XLORA

    @peft_type.setter
    def peft_type(self, _value: object) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Ignored: the type follows from the fields."""

    @property
    def hidden_size_given(self) -> bool:
        """Whether the hidden size was given, so that it is not the default."""
        return not isinstance(self.hidden_size, _AssumedSize)

    @property
    def new_experts(self) -> dict[str, LoraConfig]:
        """The experts that do not exist yet, by name."""
        return {name: place for name, place in self.adapters.items() if isinstance(place, LoraConfig)}

    def validate(self) -> None:
        super().validate()
        require_integer("hidden_size", self.hidden_size, at_least=1, remedy="Use base.config.hidden_size.")
        self._validate_router()
        self._validate_elsewhere()
        require_integer("xlora_depth", self.xlora_depth, at_least=1, remedy="Use xlora_depth=1 or more.")
        require(
            self.xlora_depth <= _DEEPEST,
            f"xlora_depth must not exceed {_DEEPEST}.",
            received=f"xlora_depth={self.xlora_depth!r}",
            remedy="Use a small depth; two or three are usual.",
        )
        if self.xlora_depth > 1:
            require_integer("xlora_size", self.xlora_size, at_least=1, remedy="Use the width of a layer, e.g. 2048.")
            require_probability("xlora_dropout_p", self.xlora_dropout_p)
            require(
                self.xlora_dropout_p < 1,
                "xlora_dropout_p must be below 1.",
                received=f"xlora_dropout_p={self.xlora_dropout_p!r}",
                remedy="Use xlora_dropout_p=0.0 for no dropout, or a value below 1.",
            )
        require_finite("softmax_temperature", self.softmax_temperature, remedy="Use softmax_temperature=1.0.")
        require(
            self.softmax_temperature > 0,
            "softmax_temperature must be positive.",
            received=f"softmax_temperature={self.softmax_temperature!r}",
            remedy="Use softmax_temperature=1.0, or less for sharper scalings.",
        )
        for name in ("scaling_pass_value", "global_scaling_weight"):
            require_finite(name, getattr(self, name), remedy=f"Use a number for {name}.")
        if cast("object", self.top_k_lora) is not None:
            require_integer("top_k_lora", self.top_k_lora, at_least=None, remedy="Use a whole number, or None.")
        for name in _SWITCHES:
            require_switch(name, getattr(self, name))

    def _validate_router(self) -> None:
        for name in ("router", "gating"):
            value = getattr(self, name)
            require(
                isinstance(value, str) and bool(value.strip()),
                f"{name} must be the name of a kind of {name}.",
                received=f"{name}={value!r}",
                remedy=f"Leave {name} out, or name a registered kind (see loramix.routers).",
            )
        settings = cast("object", self.gating_settings)
        require(
            isinstance(settings, dict)
            and all(isinstance(key, str) for key in cast("dict[object, object]", settings))
            and all(isinstance(value, _SETTING) for value in cast("dict[object, object]", settings).values()),
            "gating_settings must map names to numbers, texts, True, False or None.",
            received=f"gating_settings={settings!r}",
            remedy='Write gating_settings as a mapping, for example {"alpha": 1.5}, or leave it out.',
        )
        given = [name for name in OF_THE_CLASSIFIER if getattr(self, name) != _default(name)]
        require(
            self.router == _CLASSIFIER or not given,
            f"{', '.join(given)} {'belongs' if len(given) == 1 else 'belong'} to the classifier.",
            received=", ".join(f"{name}={getattr(self, name)!r}" for name in ("router", *given)),
            remedy=f"Leave {', '.join(given)} out, or use router={_CLASSIFIER!r}.",
        )

    def _validate_elsewhere(self) -> None:
        given = cast("object", self.elsewhere)
        entries = cast("dict[object, object]", given) if isinstance(given, dict) else {None: None}
        for part, scalings in entries.items():
            require(
                isinstance(part, str) and bool(part) and (scalings == UNIFORM or isinstance(scalings, dict)),
                f'elsewhere must map parts of paths to "{UNIFORM}", or to the scalings of experts by name.',
                received=f"elsewhere={given!r}",
                remedy='Write for example elsewhere={"vision_tower": {"math": 1.0}}.',
            )
            for name, value in cast("dict[str, object]", scalings if isinstance(scalings, dict) else {}).items():
                require(
                    name in self.adapters or not self.adapters,
                    "elsewhere must name experts of the mixture.",
                    received=f"elsewhere[{part!r}] with {name!r}, and experts {', '.join(map(repr, self.adapters))}",
                    remedy="Name experts of the mixture.",
                )
                require_finite(f"elsewhere[{part!r}][{name!r}]", value, remedy="Use a number, such as 1.0.")

    def parts_elsewhere(self, path: str) -> list[str]:
        """The entries of `elsewhere` that fit the layer at `path`."""
        return [part for part in self.elsewhere if f".{part}." in f".{path}."]

    def scalings_elsewhere(self, path: str) -> list[float] | None:
        """The given scaling of each expert, in their order, for the layer at `path`; None if none is given."""
        fitting = self.parts_elsewhere(path)
        if not fitting:
            return None
        scalings = self.elsewhere[max(fitting, key=len)]
        if scalings == UNIFORM:
            return [1 / len(self.adapters)] * len(self.adapters)
        return [float(scalings.get(name, 0.0)) for name in self.adapters]

    def validate_for(self, num_experts: int, hidden_size: int) -> None:
        """Check the rules that depend on the base model and the experts, and all others again.

        Args:
            num_experts: E.
            hidden_size: H of the base model.

        Raises:
            ConfigurationError: no experts, a `top_k_lora` outside 1..E, or a given `hidden_size` that is not H.
        """
        self.validate()
        require(
            num_experts >= 1,
            "A mixture needs at least one expert.",
            received=f"adapters={self.adapters!r}",
            remedy='Give adapters={"name": "path or Hub id", …}.',
        )
        require(
            self.top_k_lora is None or 1 <= self.top_k_lora <= num_experts,
            f"top_k_lora must be None or from 1 to {num_experts}, the number of experts.",
            received=f"top_k_lora={self.top_k_lora!r}",
            remedy=f"Use top_k_lora={num_experts} or less, or None to keep all.",
        )
        require(
            not self.hidden_size_given or self.hidden_size == hidden_size,
            f"hidden_size must be the base model's, {hidden_size}.",
            received=f"hidden_size={self.hidden_size!r}",
            remedy=f"Use hidden_size={hidden_size}, or leave it out.",
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields by name; those that PEFT does not have only if they differ from the default."""
        adapters = self.adapters | {name: new.to_dict() for name, new in self.new_experts.items()}
        values = super().to_dict() | {"hidden_size": int(self.hidden_size), "adapters": adapters}
        return {name: value for name, value in values.items() if name not in _BEYOND_PEFT} | self._beyond_peft()

    @classmethod
    def _known(cls, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        known = super()._known(values, source)
        named = any(known.get(name, default) != default for name, default in _BEYOND_PEFT.items())
        require(
            values.get("peft_type") != PeftType.LORAMIX.value or named,
            "A configuration with peft_type LORAMIX has a router, a gating or given scalings that PEFT does not have.",
            received=", ".join(f"{name}={known.get(name)!r}" for name in ("router", "gating", "elsewhere")),
            remedy='Put "router", "gating" or "elsewhere" back into the file, or write "peft_type": "XLORA".',
        )
        return known

    def _beyond_peft(self) -> dict[str, Any]:
        """The fields that PEFT does not have, as far as they differ from the default."""
        values = {name: getattr(self, name) for name in _BEYOND_PEFT}
        return {name: value for name, value in values.items() if value != _BEYOND_PEFT[name]}

    def _to_saved(self) -> dict[str, Any]:
        new = self.new_experts
        require(
            not new,
            "A saved configuration says where its experts are.",
            received=f"{', '.join(map(repr, new))}, which are to be made",
            remedy="Build the mixture with get_peft_model, and save that.",
        )
        return self.to_dict() if self.hidden_size_given else self.to_dict() | {"hidden_size": None}

    def _warn_about_gating(self) -> None:
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("enable_softmax_topk is set without top_k_lora: the softmax is taken over all experts.")
        if self.enable_softmax_topk and self.enable_softmax:
            warn("enable_softmax_topk and enable_softmax are both set: softmax twice, which performs worse.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warn(f"top_k_lora must be at least 1, and is {self.top_k_lora}: no model can be built like this.")


_CLASSIFIER = "classifier"
OF_THE_CLASSIFIER = ("xlora_depth", "xlora_size", "xlora_dropout_p", "use_bias", "enable_relu_and_dropout")
"""The fields that mean something for the classifier alone."""
_BEYOND_PEFT: Mapping[str, Any] = {
    "router": _CLASSIFIER,
    "gating": "xlora",
    "gating_settings": {},
    "elsewhere": {},
    "use_bias": True,
    "enable_relu_and_dropout": True,
}
UNIFORM = "uniform"
"""In `elsewhere`: every expert counts as much as any other."""
_SETTING = (str, int, float, bool, type(None))
_DEEPEST = 1000
_SWITCHES = (
    "enable_softmax",
    "enable_softmax_topk",
    "layerwise_scalings",
    "use_trainable_adapters",
    "use_bias",
    "enable_relu_and_dropout",
)


def _default(name: str) -> object:
    return XLoraConfig.__dataclass_fields__[name].default


def as_adapters(adapters: object, *, new: bool = False) -> dict[str, Any]:
    """A mapping from experts' names to folders or Hub ids, with paths as texts; the order stays.

    Args:
        adapters: the mapping.
        new: whether it may hold configurations of new experts, which become `LoraConfig`s of loramix.

    Raises:
        ConfigurationError: not a mapping, or a value that is neither text nor path.
        AdapterNameError: a name that cannot be the name of a folder, or two that clash.
    """
    if not isinstance(adapters, Mapping):
        raise ConfigurationError(
            "adapters must map names to folders or Hub ids.",
            received=f"adapters={adapters!r}",
            remedy='Write adapters={"name": "path or Hub id", …}.',
        )
    places = cast("Mapping[str, object]", adapters)
    check_expert_names(places)
    return {name: _as_place(name, place, new) for name, place in places.items()}


def _as_place(name: str, place: object, new: bool) -> str | LoraConfig:
    place = as_own(place)
    if isinstance(place, LoraConfig):
        require(
            new,
            "Saved experts are replaced by experts that exist.",
            received=f"adapters[{name!r}] is a LoraConfig, which is a new expert",
            remedy="Build a mixture with new experts by get_peft_model(base, XLoraConfig(adapters={…})).",
        )
        return place
    if not isinstance(place, str | os.PathLike):
        raise ConfigurationError(
            f"adapters must map each name to a folder or a Hub id{', or to a LoraConfig' if new else ''}.",
            received=f"adapters[{name!r}]={place!r}",
            remedy=f'Write adapters={{"{name}": "path or Hub id", …}}.',
        )
    return os.fspath(cast("str | os.PathLike[str]", place))
