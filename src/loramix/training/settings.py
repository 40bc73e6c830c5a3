"""The settings of a training run: one YAML file, or the same from keyword arguments.

base: meta-llama/Llama-3.2-1B            # folder or Hub id
experts: {math: …, code: …}              # name -> folder or Hub id; new ones: see `expert_places`
data: train.jsonl                        # see `loramix.training.data`
output: runs/first
mixture: {xlora_depth: 2, xlora_size: 256}        # fields of XLoraConfig
objectives: {z_loss: 0.001, supervised: 0.1}      # fields of RouterObjectives
init: {method: prompts, prompts: prompts.json}    # or random, zeros, text, labels; chosen if left out
trainer: {max_steps: 500, learning_rate: 0.003}   # fields of TRL's SFTConfig
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, cast, no_type_check

from loramix.config.checks import require, require_integer
from loramix.config.lora import LoraConfig
from loramix.errors import ConfigurationError

_SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@no_type_check
@dataclass(frozen=True)
class Data:
    """Where a run's text comes from.

    Args:
        train: a file, a folder, or the id of a data set on the Hub.
        eval: likewise, for evaluation; None evaluates nothing.
        split: the split of a data set on the Hub to train on.
        eval_split: the split to evaluate with.
        subset: the subset of a data set on the Hub that has several.
    """

    train: str
    eval: str | None = None
    split: str = "train"
    eval_split: str = "test"
    subset: str | None = None


@no_type_check
@dataclass(frozen=True)
class TrainSettings:
    """A run that trains a router, and with it the experts that are new.

    Args:
        base: the base model, a folder or a Hub id.
        experts: the experts, name -> folder or Hub id, or as `expert_places` reads them.
        data: the text to train on and to evaluate with.
        output: the folder for checkpoints, the trained mixture and its evaluation.
        revision: the revision of the base model.
        dtype: the dtype of the base model: "auto", "float32", "bfloat16", "float16".
        mixture: fields of `XLoraConfig`.
        objectives: fields of `RouterObjectives`.
        init: `method` ("random", "zeros", "prompts", "text", "labels") and, for prompts, `prompts`: a JSON file of
            name -> texts, a folder of text files `<name>.txt`, or a mapping of name -> text file. Without `method`:
            labels where the data names every expert, else the prompts, else zeros, if the router's kind has them.
        cache: bytes for the hidden states of the scaling pass ("500MB"); None runs the pass again in each epoch.
        cache_folder: where to keep them in a file instead of in memory.
        trainer: fields of TRL's `SFTConfig`.

    Raises:
        ConfigurationError: a key that does not exist, or a value that cannot work.
    """

    base: str
    experts: dict[str, Any]
    data: Data
    output: str = "loramix-training"
    revision: str | None = None
    dtype: str = "auto"
    mixture: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    cache: str | int | None = None
    cache_folder: str | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("mixture", "objectives", "init", "trainer", "experts"):
            require(
                isinstance(getattr(self, name), Mapping),
                f"{name} holds names and values.",
                received=f"{name}={getattr(self, name)!r}",
                remedy=f"Write {name} as a mapping.",
            )
        _refuse_taken(self.trainer, self.mixture)
        for name in ("train", "eval"):
            place = getattr(self.data, name)
            require(
                isinstance(place, str) or (name == "eval" and place is None),
                f"data.{name} is a file, a folder, or the id of a data set.",
                received=f"data.{name}={place!r}",
                remedy="Write it as a path.",
            )
        require(
            self.cache_folder is None or self.cache is not None,
            "cache_folder is the folder of the hidden states, cache how many bytes they may take.",
            received=f"cache_folder={self.cache_folder!r} without cache",
            remedy="Add cache: 2GB, or leave cache_folder out.",
        )
        method = self.init.get("method")
        check_keys(self.init, ("method", "prompts"), "init")
        given = "prompts" in self.init
        require(
            method in (None, "random", "zeros", "prompts", "text", "labels")
            and (given if method == "prompts" else not given or method is None),
            'init.method is "random", "zeros", "text", "labels", or "prompts" with init.prompts, where the texts are.',
            received=f"init={dict(self.init)!r}",
            remedy="Write for example init: {method: prompts, prompts: prompts.json}.",
        )
        _ = self.cache_bytes

    @property
    def cache_bytes(self) -> int | None:
        """`cache` as a number of bytes."""
        return None if self.cache is None else parse_size(self.cache)

    @classmethod
    def read(cls, path: str | Path | None, changes: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file, and apply changes.

        Args:
            path: the file; None starts from empty settings.
            changes: dotted key -> value, for example {"trainer.max_steps": 10}.

        Raises:
            ConfigurationError: a file that is no YAML mapping, or settings that cannot work.
        """
        content = {} if path is None else _load(Path(path))
        for key, value in (changes or {}).items():
            _put(content, key.split("."), value)
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The settings from a mapping; `data` may be a single path.

        Raises:
            ConfigurationError: keys that are missing or do not exist.
        """
        check_keys(content, [entry.name for entry in fields(cls)], "the settings")
        missing = [name for name in ("base", "experts", "data") if not content.get(name)]
        if missing:
            raise ConfigurationError(
                "A training names its base model, its experts and its data.",
                received=f"no {', '.join(missing)}",
                remedy="Write them into the file, or give --base, --expert NAME=PATH and --data.",
            )
        data = content["data"]
        if isinstance(data, Mapping):
            check_keys(data, [entry.name for entry in fields(Data)], "data")
            require(
                "train" in data, "data names what to train on.", received=f"data={data!r}", remedy="Add data.train."
            )
        values: dict[str, Any] = {**content, "data": Data(**data) if isinstance(data, Mapping) else Data(str(data))}
        return cls(**values)


@no_type_check
@dataclass(frozen=True)
class ExpertSettings:
    """A run that trains one LoRA expert.

    Args:
        base: the base model, a folder or a Hub id.
        data: the text to train on.
        output: the expert's folder; checkpoints go into `training/` below it.
        revision: the revision of the base model.
        dtype: as for `TrainSettings`.
        lora: fields of `LoraConfig`; all linear layers at rank 8 by default.
        trainer: fields of TRL's `SFTConfig`.
    """

    base: str
    data: Data
    output: str
    revision: str | None = None
    dtype: str = "auto"
    lora: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_taken(self.trainer, self.lora)


def expert_places(experts: Mapping[str, Any]) -> dict[str, str | dict[str, Any]]:
    """The experts of a run by name: the folder or Hub id of each; of a new one the fields of its `LoraConfig`.

    An expert is written as `math: path`, a new one as `law: {r: 8}`. `new: 8` stands for eight new ones, e0 to e7,
    whose fields stand beside it: `experts: {math: path, new: 8, r: 8}`. Then names of fields are no names of experts;
    `new` never is one.

    Raises:
        ConfigurationError: a count that is none, a value that is neither a place nor fields, a field that does not
            exist, or two experts of a name.
    """
    known = [entry.name for entry in fields(LoraConfig)]
    shared = {name: value for name, value in experts.items() if _NEW in experts and name in known}
    found: dict[str, Any] = {}
    for name, value in experts.items():
        if name in shared:
            continue
        members = {name: value}
        if name == _NEW:
            require_integer("experts.new", value, at_least=1, remedy=_NEW_REMEDY)
            members = {f"e{number}": dict(shared) for number in range(value)}
        twice = found.keys() & members
        require(
            not twice,
            "new makes experts e0, e1, …, and no other has such a name.",
            received=f"{', '.join(sorted(twice))} beside new={experts.get(_NEW)!r}",
            remedy="Rename the others.",
        )
        found |= members
    for name, value in found.items():
        require(
            isinstance(value, str | Mapping),
            "experts maps names to folders or Hub ids, or to the fields of a new expert's LoraConfig.",
            received=f"experts.{name}={value!r}",
            remedy=f"Write {name}: path, or {name}: {{r: 8}}; beside new: 8, fields such as r stand alone.",
        )
        if isinstance(value, Mapping):
            check_keys(value, known, f"experts.{name}")
            _refuse_taken(value)
    return found


_NEW = "new"
_NEW_REMEDY = "Write new: 8 for eight new experts; an expert of that name needs another one."


def _refuse_taken(*groups: Mapping[str, Any]) -> None:
    own = "nothing: it is the base model's"
    taken = {
        "output_dir": "output",
        "adapters": "experts",
        "hidden_size": own,
        "revision": "revision, beside base",
        "base_model_name_or_path": "base",
    }
    for name in taken.keys() & {key for group in groups for key in group}:
        raise ConfigurationError(f"{name} is said once.", received=f"{name} in a group", remedy=f"Use {taken[name]}.")


def check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises ConfigurationError: a key that does not exist, with a similar one that does."""
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigurationError(
                f"{where} has the keys {', '.join(known) if len(known) < 20 else 'of its class'}.",
                received=f"{key!r}",
                remedy=f"Did you mean {close[0]!r}?" if close else "Leave it out.",
            )


def parse_size(size: str | int) -> int:
    """`500MB`, `2 GiB` or a plain number, as bytes.

    Raises:
        ConfigurationError: none of these.
    """
    text = str(size).strip().lower().replace(" ", "")
    unit = next((name for name in _SIZES if text.endswith(name)), "")
    try:
        value = float(text.removesuffix(unit)) * _SIZES.get(unit, 1)
        if not 0 < value < 2**60:
            raise ValueError(size)
    except ValueError:
        raise ConfigurationError(
            "A size is a number of bytes, with a unit or without.",
            received=repr(size),
            remedy="Write for example 500MB, or 2GiB.",
        ) from None
    return int(value)


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(
            "Settings are a YAML file that can be read.",
            received=f"{path}: {' '.join(str(error).split())}",
            remedy="Correct the file.",
        ) from error
    content = with_numbers(content)
    if not isinstance(content, dict):
        raise ConfigurationError(
            "Settings are a mapping of keys to values.",
            received=f"{path}: a {type(content).__name__}",
            remedy="Write base:, experts:, data: and so on, each on a line.",
        )
    return cast("dict[str, Any]", content)


def with_numbers(value: Any) -> Any:
    """Turn text such as 1e-3 into numbers: YAML 1.1 reads it as text without a point or a sign."""
    if isinstance(value, dict):
        return {key: with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_numbers(inner) for inner in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


def _put(content: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = content.get(key)
        if key == "data" and isinstance(inner, str):
            inner = {"train": inner}
        if not isinstance(inner, dict):
            inner = {}
        content[key] = inner
        content = inner
    content[keys[-1]] = value


def read_prompts(place: str | Path | Mapping[str, str]) -> dict[str, str | Path | list[str]]:
    """Expert name -> texts, for `init_router`.

    Args:
        place: a JSON file of name -> text or texts, a folder of text files `<name>.txt`, or name -> text file.

    Raises:
        ConfigurationError: none of these.
    """
    if isinstance(place, Mapping):
        return {name: Path(file).expanduser() for name, file in place.items()}
    path = Path(place).expanduser()
    if path.is_dir():
        return {file.stem: file for file in sorted(path.glob("*.txt"))}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        texts = {name: [value] if isinstance(value, str) else list(value) for name, value in content.items()}
        if not all(isinstance(text, str) for values in texts.values() for text in values):
            raise TypeError("texts that are no strings")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            "Prompts are a JSON file of expert name -> texts, or a folder with a text file for each expert.",
            received=f"{place}: {error}",
            remedy='Write {"math": ["2 + 2 ="], "code": ["def f("]}, or prompts/math.txt, prompts/code.txt.',
        ) from error
    return dict(texts)
