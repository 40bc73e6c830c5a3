"""The base of adapter configurations: PEFT's fields, defaults and file layout.

    PeftConfig
    ├── LoraConfig      one expert              (loramix.config.lora)
    └── XLoraConfig     a mixture of experts    (loramix.config.xlora)

A subclass names the `peft_type` that it reads: `class LoraConfig(PeftConfig, reads=[PeftType.LORA])`.

The classes check their own values, which also come from files. `no_type_check` keeps the tests' run-time type checker
from rejecting them first.

A configuration is stored as `adapter_config.json`. Every field of PEFT 0.21.2 is read, kept and written back; features
that a mixture does not support are refused by `loramix.experts.features`.

Source: PEFT 0.21.2, `config.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast, no_type_check, runtime_checkable

from loramix.config.checks import require, require_text, warn
from loramix.config.folder import CONFIG_NAME, MLX_REMEDY, find_config
from loramix.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigurationError,
    CorruptCheckpointError,
    UnsupportedAdapterError,
)
from loramix.files.atomic import save_text
from loramix.files.hub import HubOptions
from loramix.files.json_file import read_json_object
from loramix.files.location import Location


class PeftType(str, Enum):  # noqa: UP042 - prints as PEFT's does
    """The types of adapter that loramix reads."""

    LORA = "LORA"
    XLORA = "XLORA"
    LORAMIX = "LORAMIX"  # a mixture with a router or a gating that PEFT does not have


class TaskType(str, Enum):  # noqa: UP042
    """The base model's task."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@no_type_check
@dataclass
class PeftConfig:
    """The fields that every adapter configuration has.

    Args:
        task_type: a `TaskType` or its value.
        peft_type: a `PeftType`; set by the subclasses.
        auto_mapping: the base model's class, which PEFT writes for models without a task type.
        peft_version: the PEFT version that wrote the file, if PEFT wrote it.
        base_model_name_or_path: the base model's identifier.
        revision: the base model's revision.
        inference_mode: whether the adapter was saved for inference.

    Raises:
        ConfigurationError: an unknown task type, or a value of a wrong type.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    _unsaved: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, *, reads: Iterable[PeftType] = (), **kwargs: Any) -> None:
        """Register the subclass as the reader of files of these types."""
        super().__init_subclass__(**kwargs)
        _CLASSES.update(dict.fromkeys(reads, cls))

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every rule that does not depend on the base model.

        Raises:
            ConfigurationError: naming the field, its value and a remedy.
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
        """All fields by name, as PEFT's `to_dict` returns them; a deep copy."""
        return {name: value for name, value in asdict(self).items() if name not in self._unsaved}

    def to_json(self) -> str:
        """The text of `adapter_config.json`: indented by 2, fields and sets sorted, mappings in their order."""
        return json.dumps(dict(sorted(self._to_saved().items())), indent=2, default=_to_jsonable)

    def _to_saved(self) -> dict[str, Any]:
        return self.to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a folder, which is created if missing.

        Raises:
            SaveError: the file could not be written; an earlier one is still in place.
        """
        save_text(Path(save_directory) / CONFIG_NAME, self.to_json())

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
            CorruptCheckpointError: a file that is not a JSON object.
            CheckpointError: the configuration of another type of adapter than this class reads.
            UnsupportedAdapterError: an adapter that is neither LoRA nor a mixture.
            ConfigurationError: invalid values.
        """
        location = Location(pretrained_model_name_or_path, HubOptions.from_kwargs(hub_kwargs))
        return cls.from_json_file(find_config(location))

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read an `adapter_config.json` by its path; otherwise as `from_pretrained`."""
        return cls.from_values(read_json_object(path), os.fspath(path))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: str) -> Self:
        """The configuration of these fields, of the class that their `peft_type` names; raises as `from_pretrained`."""
        kind = _class_of(values, cls, source)
        try:
            return cast(Self, kind(**kind._known(values, source)))
        except (ConfigurationError, AdapterNameError) as error:
            raise type(error)(error.rule, received=f"{error.received} in {source}", remedy=error.remedy) from error

    @classmethod
    def _known(cls, values: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The values without those that are never stored and, with a warning, those of unknown fields."""
        names = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            warn(f"{source} holds fields that {cls.__name__} does not know: {', '.join(unknown)}. They are ignored.")
        return {name: value for name, value in values.items() if name in names - cls._unsaved}


@runtime_checkable
class PeftsConfig(Protocol):
    """A configuration of one of PEFT's own classes."""

    def to_dict(self) -> dict[str, Any]: ...


def as_own(config: object) -> Any:
    """A configuration of PEFT's as one of ours, by its fields, as its file would be read; anything else as it is.

    Raises:
        As `PeftConfig.from_pretrained`.
    """
    kind = type(config)
    if not kind.__module__.startswith("peft.") or not isinstance(config, PeftsConfig):
        return config
    text = json.dumps(config.to_dict(), default=_to_jsonable)
    return PeftConfig.from_values(json.loads(text), f"a {kind.__module__}.{kind.__name__}")


_CLASSES: dict[PeftType, type[PeftConfig]] = {}


def _class_of(values: Mapping[str, Any], expected: type[PeftConfig], source: str) -> type[PeftConfig]:
    peft_type: object = values.get("peft_type")
    if peft_type is None and expected is not PeftConfig:
        return expected
    if not isinstance(peft_type, str):
        if "fine_tune_type" in values or "lora_parameters" in values:
            raise UnsupportedAdapterError(
                "Adapters are in PEFT's layout.",
                received=f"{source}, the configuration of an adapter of mlx-lm",
                remedy=MLX_REMEDY,
            )
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
        read = [member.value for member, kind in _CLASSES.items() if kind is expected]
        raise CheckpointError(
            f"{expected.__name__} reads adapters whose peft_type is {' or '.join(read)}.",
            received=f"peft_type {peft_type!r} in {source}",
            remedy=f"Use {found.__name__}.from_pretrained or PeftConfig.from_pretrained, or give another folder.",
        )
    return found


def _as_text(path: object) -> object:
    return os.fspath(cast("os.PathLike[str]", path)) if isinstance(path, os.PathLike) else path


def _to_jsonable(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(cast("set[str]", value))
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    raise TypeError(f"{type(value).__name__} in a configuration")
