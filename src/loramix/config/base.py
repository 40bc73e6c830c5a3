"""The configuration of one LoRA expert and of a mixture, with PEFT's field names, defaults and file layout.

    PeftConfig
    ├── LoraConfig      one expert
    └── XLoraConfig     a mixture of experts and the classifier that routes between them

The classes check their own values, since these also come from files; `no_type_check` keeps the tests' run-time type
checker from doing so first.

A configuration lies in `adapter_config.json`. Every field of PEFT 0.21.2 is read, kept and written back; those that
a mixture cannot carry are refused by `refuse_unsupported`, by name.

Source: PEFT 0.21.2, `config.py`, `tuners/lora/config.py`, `tuners/xlora/config.py`.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self, cast, no_type_check

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
    require_text,
)
from loramix.config.names import check_expert_names
from loramix.errors import (
    AdapterNameError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    SaveError,
    UnsupportedAdapterError,
)
from loramix.files.hub import HubOptions, find_file
from loramix.files.json_file import read_json_object

CONFIG_NAME = "adapter_config.json"


class PeftType(str, Enum):  # noqa: UP042 - prints as PEFT's does
    """The kinds of adapter that loramix knows."""

    LORA = "LORA"
    XLORA = "XLORA"


class TaskType(str, Enum):  # noqa: UP042
    """What the base model is used for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@no_type_check
@dataclass
class PeftConfig:
    """What every adapter configuration has.

    Args:
        task_type: one of `TaskType`, as member or string.
        peft_type: one of `PeftType`; the subclasses set their own.
        auto_mapping: the base model's class, as PEFT writes it for models without a task type.
        peft_version: the PEFT version that wrote the file; None in a configuration that PEFT did not write.
        base_model_name_or_path: the base model's identifier.
        revision: the base model's revision.
        inference_mode: whether the adapter was saved for inference.

    Raises:
        ConfigurationError: a task type that does not exist, or a value of a wrong type.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    _unsaved: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every rule that the configuration alone can break.

        Raises:
            ConfigurationError: naming the field, what it holds and what to write instead.
        """
        allowed = [task.value for task in TaskType]
        require(
            self.task_type is None or self.task_type in allowed,
            f"task_type must be None or one of {', '.join(allowed)}.",
            received=f"task_type={self.task_type!r}",
            remedy="Use a member of TaskType, for example TaskType.CAUSAL_LM.",
        )
        require_text("base_model_name_or_path", _as_text(self.base_model_name_or_path))
        require_text("revision", self.revision)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as PEFT's `to_dict` gives them; changing the result changes nothing here."""
        return {name: value for name, value in asdict(self).items() if name not in self._unsaved}

    def to_json(self) -> str:
        """The text of `adapter_config.json`: indented by 2, fields and sets sorted, mappings in their own order."""
        return json.dumps(dict(sorted(self._to_saved().items())), indent=2, default=_to_jsonable)

    def _to_saved(self) -> dict[str, Any]:
        return self.to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a folder, which is made where it is missing.

        Raises:
            SaveError: the file could not be written; an earlier one is still in place.
        """
        folder = Path(save_directory)
        temporary = folder / f".{CONFIG_NAME}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(folder / CONFIG_NAME)
        except OSError as error:
            if folder.is_dir():
                temporary.unlink(missing_ok=True)
            raise SaveError(
                "A configuration is saved into a folder that can be written.",
                received=f"{str(folder)!r}: {error}",
                remedy="Give a folder, not a file, with room and permission to write.",
            ) from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub_kwargs: Any) -> Self:
        """Read `adapter_config.json` from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: a local folder or a Hub identifier (see `loramix.files.hub`).
            hub_kwargs: the fields of `HubOptions`: revision, subfolder, token, cache_dir, …

        Returns:
            The class that the file's `peft_type` names: `LoraConfig` or `XLoraConfig`.

        Raises:
            CheckpointNotFoundError: no such folder or repository, or no `adapter_config.json` in it.
            CorruptCheckpointError: a file that is no JSON object.
            CheckpointError: the file of the other kind of adapter.
            UnsupportedAdapterError: an adapter that is neither LoRA nor X-LoRA.
            ConfigurationError: values that cannot work.
        """
        options = HubOptions.from_kwargs(hub_kwargs)
        path = find_file(pretrained_model_name_or_path, CONFIG_NAME, options)
        if path is None:
            raise _no_adapter(pretrained_model_name_or_path, options)
        return cls.from_json_file(path)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read one `adapter_config.json`; otherwise as `from_pretrained`."""
        source = os.fspath(path)
        values = read_json_object(path)
        kind = _class_of(values.get("peft_type"), cls, source)
        try:
            return cast(Self, kind(**kind._known(values, source)))
        except (ConfigurationError, AdapterNameError) as error:
            raise type(error)(error.rule, received=f"{error.received} in {source}", remedy=error.remedy) from error

    @classmethod
    def _known(cls, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Leave out what is not stored (`runtime_config`) and, with a warning, what a later PEFT added."""
        names = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            cls._warn(
                f"{source} holds fields that {cls.__name__} does not know: {', '.join(unknown)}. They are ignored."
            )
        return {name: value for name, value in values.items() if name in names - cls._unsaved}

    @staticmethod
    def _warn(message: str) -> None:
        """Warn at the first line outside this file and outside the dataclasses' generated `__init__`."""
        level, frame = 1, inspect.currentframe()
        while frame is not None and frame.f_code.co_filename in (__file__, "<string>"):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, UserWarning, stacklevel=level)


@no_type_check
@dataclass
class LoraConfig(PeftConfig):
    """One LoRA expert: y = base(x) + c B A dropout(x), with c = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.

    All fields of PEFT 0.21.2 are here, so that every PEFT file reads and is written back as it was. Fields that hold
    configurations of their own (`eva_config`, …) are kept as plain dictionaries.

    Args:
        r: rank, at least 1.
        target_modules: module names (a path equal to one, or ending in "." and one), or one regular expression
            for whole paths, or "all-linear".
        exclude_modules: as target_modules, and stronger.
        lora_alpha: numerator of c.
        lora_dropout: probability, in [0, 1).
        fan_in_fan_out: the base layer stores its weight as (in, out), as GPT-2's Conv1D does.
        bias: "none", "all" or "lora_only".
        use_rslora: c = lora_alpha / sqrt(r).
        layers_to_transform: index or indices of the blocks to adapt.
        layers_pattern: the name of the list of blocks that those indices count.
        rank_pattern: r for modules whose path a key matches.
        alpha_pattern: lora_alpha for modules whose path a key matches.
        use_dora: weight-decomposed LoRA.
        lora_bias: a bias on B.

    Raises:
        ConfigurationError: a value that no expert can have.
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
        self.rank_pattern = {} if cast(object, self.rank_pattern) is None else self.rank_pattern
        self.alpha_pattern = {} if cast(object, self.alpha_pattern) is None else self.alpha_pattern
        super().__post_init__()

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
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            require_names(name, getattr(self, name))
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
_NOT_GIVEN = cast(Any, None)


class _AssumedSize(int):
    """A hidden size that nobody gave; an int, so that copying, replacing and pickling keep the memory of it."""

    def __repr__(self) -> str:
        return str(int(self))


@no_type_check
@dataclass
class XLoraConfig(PeftConfig):
    """A mixture: which experts, and how the classifier routes between them.

    The classifier maps the base model's last hidden state h (B, S, H) to logits z, and these to scalings s
    (B, S, L, E): s = softmax(z / softmax_temperature) with `enable_softmax`, else z; with `top_k_lora` all but the k
    largest become 0; with `enable_softmax_topk` a softmax over those that are left.

    Args:
        hidden_size: H, the base model's; where it is not given the base model's is taken when the model is built.
        adapters: name -> local folder or Hub identifier, in the order of the experts.
        enable_softmax: softmax over all experts.
        enable_softmax_topk: softmax over the selected experts.
        layerwise_scalings: scalings of their own for each adapted layer, instead of shared ones.
        xlora_depth: linear layers of the classifier, at least 1.
        xlora_size: width of its hidden layers, at least 1; only with depth > 1.
        xlora_dropout_p: its dropout, in [0, 1); only with depth > 1.
        use_trainable_adapters: train the experts too.
        softmax_temperature: positive; lower is sharper.
        top_k_lora: experts kept for each token, from 1 to E; None keeps all.
        scaling_pass_value: the scaling of every expert in the scaling pass.
        global_scaling_weight: factor on what the experts add.

    Raises:
        ConfigurationError: a value that cannot work, whatever the base model is.
        AdapterNameError: an expert's name that cannot be a folder, or two that clash.

    Source: X-LoRA, arXiv 2402.07148, section 2; PEFT 0.21.2, `tuners/xlora/config.py`.
    """

    hidden_size: int = _NOT_GIVEN
    adapters: dict[str, str] = _NOT_GIVEN
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

    def __post_init__(self) -> None:
        self.peft_type = PeftType.XLORA
        missing_adapters = cast(object, self.adapters) is None
        if cast(object, self.hidden_size) is None:
            self._warn("hidden_size was not given: the base model's is taken when the model is built, 4096 until then.")
            self.hidden_size = _AssumedSize(4096)
        if missing_adapters:
            self._warn("adapters was not given: this mixture has no experts yet.")
        self.adapters = {} if missing_adapters else as_adapters(self.adapters)
        super().__post_init__()
        self._warn_about_gating()

    @property
    def hidden_size_given(self) -> bool:
        """Whether somebody gave the hidden size, rather than the default standing in for it."""
        return not isinstance(self.hidden_size, _AssumedSize)

    def validate(self) -> None:
        super().validate()
        require_integer("hidden_size", self.hidden_size, at_least=1, remedy="Use base.config.hidden_size.")
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

    def validate_for(self, num_experts: int, hidden_size: int) -> None:
        """Check what is known only when the model is built; every other rule is checked again with it.

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
        return super().to_dict() | {"hidden_size": int(self.hidden_size)}

    def _to_saved(self) -> dict[str, Any]:
        return self.to_dict() if self.hidden_size_given else self.to_dict() | {"hidden_size": None}

    def _warn_about_gating(self) -> None:
        if self.enable_softmax_topk and self.top_k_lora is None:
            self._warn("enable_softmax_topk is set without top_k_lora: the softmax is taken over all experts.")
        if self.enable_softmax_topk and self.enable_softmax:
            self._warn("enable_softmax_topk and enable_softmax are both set: softmax twice, which performs worse.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            self._warn(f"top_k_lora must be at least 1, and is {self.top_k_lora}: no model can be built like this.")


_DEEPEST = 1000
_SWITCHES = ("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters")
_CLASSES: dict[PeftType, type[PeftConfig]] = {PeftType.LORA: LoraConfig, PeftType.XLORA: XLoraConfig}


def _no_adapter(identifier: str | os.PathLike[str], options: HubOptions) -> CheckpointNotFoundError:
    """Tell the likeliest mistakes apart: a base model's folder, the original library's, any other."""
    remedy = "Give the folder that save_pretrained wrote, or subfolder= where it lies deeper."
    if find_file(identifier, "xlora_config.json", options):
        found = "which is a checkpoint of the original xlora library"
        remedy = "Give its experts, one folder each, to a new XLoraConfig(adapters={…}); its layout is not read."
    elif find_file(identifier, "config.json", options):
        found = "which is a model's folder, not an adapter's"
    else:
        found = "which has none"
    place = os.fspath(identifier) + (f", subfolder {options.subfolder}" if options.subfolder else "")
    return CheckpointNotFoundError(
        f"An adapter's folder holds {CONFIG_NAME}.", received=f"{place!r}, {found}", remedy=remedy
    )


def _class_of(peft_type: object, expected: type[PeftConfig], source: str) -> type[PeftConfig]:
    if peft_type is None and expected is not PeftConfig:
        return expected
    if not isinstance(peft_type, str):
        raise CorruptCheckpointError(
            "An adapter's configuration names its peft_type.",
            received=f"peft_type={peft_type!r} in {source}",
            remedy='Add "peft_type": "LORA" or "XLORA", whichever it is, or give another folder.',
        )
    known = [member.value for member in PeftType]
    if peft_type not in known:
        raise UnsupportedAdapterError(
            "A mixture is made of LoRA adapters.",
            received=f"peft_type {peft_type!r} in {source}",
            remedy=f"Give an adapter whose peft_type is {' or '.join(known)}.",
        )
    found = _CLASSES[PeftType(peft_type)]
    if not issubclass(found, expected):
        raise CheckpointError(
            f"{expected.__name__} reads adapters whose peft_type is {_type_of(expected)}.",
            received=f"peft_type {peft_type!r} in {source}",
            remedy=f"Use {found.__name__}.from_pretrained or PeftConfig.from_pretrained, or give another folder.",
        )
    return found


def _type_of(kind: type[PeftConfig]) -> str:
    return next(peft_type.value for peft_type, known in _CLASSES.items() if known is kind)


def _as_set(modules: object) -> Any:
    """A collection of names as a set; what is none is left to `validate`."""
    if isinstance(modules, str | Mapping) or not isinstance(modules, Iterable):
        return modules
    names = list(cast("Iterable[object]", modules))
    return set(names) if all(isinstance(name, str) for name in names) else names


def _as_text(path: object) -> object:
    return os.fspath(cast("os.PathLike[str]", path)) if isinstance(path, os.PathLike) else path


def as_adapters(adapters: object) -> dict[str, str]:
    """A mapping from experts' names to folders or Hub ids, as texts and in its order.

    Raises:
        ConfigurationError: no mapping, or a place that is no path.
        AdapterNameError: a name that cannot be a folder, or two that clash.
    """
    if not isinstance(adapters, Mapping):
        raise ConfigurationError(
            "adapters must map names to folders or Hub ids.",
            received=f"adapters={adapters!r}",
            remedy='Write adapters={"name": "path or Hub id", …}.',
        )
    places = cast("Mapping[str, object]", adapters)
    check_expert_names(places)
    return {name: _as_place(name, place) for name, place in places.items()}


def _as_place(name: str, place: object) -> str:
    if not isinstance(place, str | os.PathLike):
        raise ConfigurationError(
            "adapters must map each name to a folder or a Hub id.",
            received=f"adapters[{name!r}]={place!r}",
            remedy=f'Write adapters={{"{name}": "path or Hub id", …}}.',
        )
    return os.fspath(cast("str | os.PathLike[str]", place))


def _to_jsonable(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(cast("set[str]", value))
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    raise TypeError(f"{type(value).__name__} in a configuration")
