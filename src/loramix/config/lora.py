"""The configuration of one LoRA expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast, no_type_check

from loramix.config.base import PeftConfig, PeftType
from loramix.config.checks import (
    require,
    require_expression,
    require_finite,
    require_indices,
    require_integer,
    require_mapping,
    require_names,
    require_probability,
    require_switch,
)
from loramix.config.wrappers import unwrapped


@no_type_check
@dataclass
class LoraConfig(PeftConfig, reads=[PeftType.LORA]):
    """One LoRA expert: y = base(x) + c B A dropout(x), with c = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.

    It has all fields of PEFT 0.21.2, so that every file of PEFT's can be read and written back unchanged. Fields with
    configurations of their own (`eva_config`, …) are kept as plain dictionaries.

    Args:
        r: rank, at least 1.
        target_modules: module names (a module's path equals one, or ends in "." and one), or one regular expression
            for whole paths, or "all-linear".
        exclude_modules: the same for modules not to adapt; takes precedence.
        lora_alpha: numerator of c.
        lora_dropout: probability, in [0, 1].
        fan_in_fan_out: whether base layers store their weights as (in, out), as GPT-2's Conv1D does.
        bias: "none", "all" or "lora_only".
        use_rslora: c = lora_alpha / sqrt(r).
        layers_to_transform: index or indices of the blocks to adapt.
        layers_pattern: the name of the list of blocks that those indices refer to.
        rank_pattern: expression -> r of the modules whose path matches it.
        alpha_pattern: expression -> lora_alpha of the modules whose path matches it.
        use_dora: weight-decomposed LoRA.
        lora_bias: a bias on B.
        target_parameters: names of parameters to adapt (a parameter's name equals one, or ends in "." and one): those
            of mixture-of-experts blocks, such as "experts.gate_up_proj", and weights.

    Raises:
        ConfigurationError: an invalid value.

    Source: LoRA, arXiv 2106.09685; PEFT 0.21.2, `tuners/lora/config.py`.
    """

    r: int = 8
    target_modules: Iterable[str] | str | None = None
    exclude_modules: Iterable[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict[str, Any])
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: dict[str, Any] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    _unsaved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        for name, default in _FOR_NULL.items():
            if getattr(self, name) is None:
                setattr(self, name, default() if callable(default) else default)
        super().__post_init__()

    def targets_parameter(self, name: str) -> bool:
        """Whether `target_parameters` matches a parameter, by PEFT's rule."""
        names = (name, unwrapped(name))
        return any(f".{each}".endswith(f".{target}") for target in self.target_parameters or () for each in names)

    def without_wrappers(self) -> LoraConfig:
        """The same with the names of modules as `unwrapped` gives them."""
        found: dict[str, Any] = {}
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            names = getattr(self, name)
            if names:
                found[name] = unwrapped(names) if isinstance(names, str) else list(map(unwrapped, names))
        for name in ("rank_pattern", "alpha_pattern"):
            found[name] = {unwrapped(key): value for key, value in getattr(self, name).items()}
        return replace(self, **found)

    def validate(self) -> None:
        super().validate()
        for name in ("rank_pattern", "alpha_pattern"):
            require_mapping(name, getattr(self, name))
        for name in _LORA_SWITCHES:
            require_switch(name, getattr(self, name))
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            require_integer(name, rank, at_least=1, remedy="Use a rank of at least 1, for example r=8.")
        alphas = {"lora_alpha": self.lora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            require_finite(name, alpha, remedy="Use a number, for example lora_alpha=16.")
        require_probability("lora_dropout", self.lora_dropout)
        require(
            self.bias in ("none", "all", "lora_only"),
            'bias must be "none", "all" or "lora_only".',
            received=f"bias={self.bias!r}",
            remedy='Use bias="none".',
        )
        require(
            isinstance(cast(object, self.init_lora_weights), bool | str | None),
            "init_lora_weights must be True, False or the name of a method.",
            received=f"init_lora_weights={self.init_lora_weights!r}",
            remedy="Use init_lora_weights=True.",
        )
        self._validate_targets()
        require(
            not (self.use_dora and self.lora_bias),
            "DoRA and lora_bias exclude each other.",
            received="use_dora=True, lora_bias=True",
            remedy="Set one of them to False.",
        )

    def _validate_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save"):
            require_names(name, getattr(self, name))
        require(
            not isinstance(cast(object, self.modules_to_save), str),
            "modules_to_save must be a list of names.",
            received=f"modules_to_save={self.modules_to_save!r}",
            remedy='Use modules_to_save=["lm_head"].',
        )
        tokens = cast(object, self.trainable_token_indices)
        for numbers in cast("Mapping[str, object]", tokens).values() if isinstance(tokens, Mapping) else [tokens]:
            require_indices("trainable_token_indices", numbers)
            require(
                not isinstance(numbers, int),
                "trainable_token_indices must be a list of tokens, or map embeddings to such lists.",
                received=f"trainable_token_indices={tokens!r}",
                remedy="Use trainable_token_indices=[5, 6].",
            )
        require(
            not isinstance(cast(object, self.target_parameters), str),
            "target_parameters must be a list of names.",
            received=f"target_parameters={self.target_parameters!r}",
            remedy='Use target_parameters=["experts.gate_up_proj"].',
        )
        require_indices("layers_to_transform", self.layers_to_transform)
        by_expression = isinstance(self.target_modules, str)
        require(
            not (by_expression and (self.layers_to_transform is not None or self.layers_pattern is not None)),
            "layers_to_transform and layers_pattern go with a list of target_modules, not with an expression.",
            received=f"target_modules={self.target_modules!r}, layers_to_transform={self.layers_to_transform!r}, "
            f"layers_pattern={self.layers_pattern!r}",
            remedy="Give target_modules as a list of names, or put the layers into the expression.",
        )
        require(
            not self.layers_pattern or self.layers_to_transform is not None,
            "layers_pattern needs layers_to_transform.",
            received=f"layers_pattern={self.layers_pattern!r}, layers_to_transform=None",
            remedy="Give the indices in layers_to_transform, or leave layers_pattern out.",
        )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                require_expression(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                require_expression(f"a key of {name}", key)


_LORA_SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")
_FOR_NULL = dict.fromkeys(_LORA_SWITCHES, False) | {
    "bias": "none",
    "lora_dropout": 0.0,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
"""What null stands for in files, field by field; r and lora_alpha have to be numbers."""


def _as_set(modules: object) -> Any:
    """A collection of names as a set; anything else as it is, for `validate` to refuse."""
    if isinstance(modules, str | Mapping) or not isinstance(modules, Iterable):
        return modules
    names = list(cast("Iterable[object]", modules))
    return set(names) if all(isinstance(name, str) for name in names) else names
