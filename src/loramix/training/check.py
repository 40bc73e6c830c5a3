"""A run's settings held against its files, before any weight of the base model is loaded.

Paths, shapes, columns, arguments and memory: what would stop a run in its third hour stops it in its first second.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramix import formats
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, DataError, SaveError
from loramix.experts.adapter import Adapter
from loramix.experts.targets import new_targets
from loramix.files.base_models import load_config, load_tokenizer, one_line
from loramix.files.hub import from_anywhere
from loramix.layers.inject import plan
from loramix.model.build import hidden_size_of
from loramix.passes.call import positions_of
from loramix.training.data import Row, pieces, read_rows
from loramix.training.initialise import check_width, prompt_texts
from loramix.training.memory import sizes_of, training_memory
from loramix.training.objectives import RouterObjectives
from loramix.training.settings import ExpertSettings, TrainSettings, check_keys, read_prompts

_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_LONGEST = 1024  # tokens of a text, where the settings do not say
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before any weight is loaded.

    Attributes:
        experts: the experts' names.
        layers: L.
        router_parameters: of the classifier.
        base_parameters: of the base model.
        rows: texts to train on.
        labelled: of them, those that name an expert.
        eval_rows: texts to evaluate with.
        steps: optimizer steps, estimated from a sample where texts are longer than `max_length`; None where the
            trainer counts epochs of packed data.
        memory: bytes by what takes them: weights exactly, activations as an estimate.
        cache_bytes: what the hidden states of the scaling pass take, with an average text of the sample.
    """

    experts: list[str]
    layers: int
    router_parameters: int
    base_parameters: int
    rows: int
    labelled: int
    eval_rows: int
    steps: int | None
    memory: dict[str, int]
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types, with the memory's sum."""
        return {**asdict(self), "memory_total": sum(self.memory.values())}


@dataclass(frozen=True)
class Checked:
    """Settings that have passed, and what was read on the way."""

    plan: Plan
    config: XLoraConfig
    objectives: RouterObjectives
    arguments: Any
    tokenizer: Any
    rows: list[Row]
    eval_rows: list[Row]
    prompts: dict[str, list[str]] | None
    dtype: torch.dtype


def check(settings: TrainSettings) -> Checked:
    """Validate a run: paths, shapes, columns, arguments, memory; no weight of the base model is loaded.

    Raises:
        LoramixError: what would stop the run, with what to change.
    """
    objectives = _objectives(settings)
    base_config, tokenizer = _base_of(settings.base, settings.revision)
    arguments = _arguments(settings.output, settings.trainer, base_config)
    dtype = _dtype(settings.dtype, base_config)
    hollow = _hollow(base_config, dtype)
    config = _mixture_config(settings, hollow)
    experts = [formats.load_adapter(name, place) for name, place in config.adapters.items()]
    sites = plan(hollow, [replace(expert, base_weights={}) for expert in experts])
    config.validate_for(len(experts), hidden_size_of(hollow))
    data = settings.data
    rows = read_rows(data.train, list(config.adapters), split=data.split, subset=data.subset)
    eval_rows = [] if data.eval is None else read_rows(data.eval, split=data.eval_split, subset=data.subset)
    rows[0].as_text(tokenizer)
    labelled = sum(row.expert is not None for row in rows)
    _check_labels(settings, objectives, config, rows, labelled)
    prompts = None
    if "prompts" in settings.init:
        prompts = prompt_texts(read_prompts(settings.init["prompts"]), list(config.adapters))
    if settings.init.get("method") in ("prompts", "labels"):
        check_width(config, len(config.adapters))
    if arguments.eval_strategy != "no" and not eval_rows:
        raise ConfigurationError(
            "An evaluation while training needs data to evaluate with.",
            received=f"trainer.eval_strategy={str(arguments.eval_strategy)!r} without data.eval",
            remedy="Add data.eval, or leave eval_strategy out.",
        )
    for place in (settings.output, settings.cache_folder):
        if place is not None:
            check_writable(Path(place))
    return Checked(
        _plan(settings, arguments, hollow, config, experts, len(sites), rows, labelled, len(eval_rows), tokenizer),
        config,
        objectives,
        arguments,
        tokenizer,
        rows,
        eval_rows,
        prompts,
        dtype,
    )


def _objectives(settings: TrainSettings) -> RouterObjectives:
    check_keys(settings.objectives, [entry.name for entry in fields(RouterObjectives)], "objectives")
    values = dict(settings.objectives)
    if isinstance(values.get("temperature"), list):
        values["temperature"] = tuple(values["temperature"])
    return RouterObjectives(**values)


def _arguments(output: str, trainer: Mapping[str, Any], base_config: Any) -> Any:
    from trl.trainer.sft_config import SFTConfig

    positions = positions_of(base_config)
    longest = min(_LONGEST, positions or _LONGEST)
    check_keys(trainer, [entry.name for entry in fields(SFTConfig)], "trainer")
    defaults = {
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "max_length": longest,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    known = {entry.name for entry in fields(SFTConfig)}
    given: dict[str, Any] = {name: value for name, value in defaults.items() if name in known} | dict(trainer)
    for old, new in _RENAMED.items():
        if old in trainer:
            given[new] = given.pop(old)
    _refuse_wrong_types(given, SFTConfig)
    if (given.get("activation_checkpointing_kwargs") or {}).get("use_reentrant"):
        raise ConfigurationError(
            "A mixture checkpoints gradients without re-entering autograd.",
            received="trainer.activation_checkpointing_kwargs with use_reentrant: true",
            remedy="Leave it out.",
        )
    length = given["max_length"]
    if isinstance(length, int) and not 2 <= length <= (positions or length):
        raise ConfigurationError(
            "max_length is at least 2 and at most the positions that the base model has.",
            received=f"trainer.max_length={length}; the base model has {positions or 'no limit'}",
            remedy=f"Use trainer.max_length={longest}.",
        )
    try:
        return SFTConfig(output_dir=output, **given)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(
            "trainer holds arguments that TRL's SFTConfig takes.",
            received=f"{dict(trainer)!r}: {one_line(error)}",
            remedy="Correct them; https://huggingface.co/docs/trl/sft_trainer lists them.",
        ) from error


def _refuse_wrong_types(given: Mapping[str, Any], kind: Any) -> None:
    """Raises ConfigurationError: no number where TRL's own default is one."""
    defaults = {entry.name: entry.default for entry in fields(kind)}
    for name, value in given.items():
        default = defaults[name]
        number = isinstance(default, int | float) and not isinstance(default, bool)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigurationError(
                f"trainer.{name} is a number.", received=f"{value!r}", remedy=f"Use for example {name}={default!r}."
            )


def check_writable(folder: Path) -> None:
    """Raise where a folder cannot be made, or written into; leaves nothing behind.

    Raises:
        SaveError: why.
    """
    made: list[Path] = []
    try:
        for place in (*reversed(folder.absolute().parents), folder.absolute()):
            if not place.is_dir():
                place.mkdir()
                made.append(place)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SaveError(
            "A run writes into its output folder.",
            received=f"{str(folder)!r}: {error}",
            remedy="Name another folder.",
        ) from error
    finally:
        for place in reversed(made):
            place.rmdir()


def _base_of(place: str, revision: str | None) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(place, revision)
    config = load_config(place, revision)
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise DataError(
            "The tokenizer's tokens are those of the base model.",
            received=f"{len(tokenizer)} tokens, and a vocabulary of {size} in {place!r}",
            remedy="Use the tokenizer that the base model was trained with.",
        )
    return config, tokenizer


def _dtype(name: str, config: Any) -> torch.dtype:
    if name == "auto":
        return getattr(config, "dtype", None) or torch.float32
    if name not in _DTYPES:
        raise ConfigurationError(
            f"dtype is auto, {', '.join(_DTYPES)}.", received=f"dtype={name!r}", remedy="Use dtype: auto."
        )
    return _DTYPES[name]


def _hollow(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The base model without weights: its modules and their shapes."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).to(dtype)
    except ValueError as error:
        raise ConfigurationError(
            "The base model is a causal language model.",
            received=f"a configuration of type {config.model_type!r}: {one_line(error)[:200]}",
            remedy="Name a base model for text generation.",
        ) from error


def _mixture_config(settings: TrainSettings, hollow: PreTrainedModel) -> XLoraConfig:
    check_keys(settings.mixture, [entry.name for entry in fields(XLoraConfig)], "mixture")
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", **settings.mixture}
    adapters = {name: from_anywhere(str(place)) for name, place in settings.experts.items()}
    base = from_anywhere(settings.base)
    return XLoraConfig(
        hidden_size=hidden_size_of(hollow),
        adapters=adapters,
        base_model_name_or_path=base,
        revision=settings.revision,
        **values,
    )


def _check_labels(
    settings: TrainSettings, objectives: RouterObjectives, config: XLoraConfig, rows: Sequence[Row], labelled: int
) -> None:
    by_labels = bool(objectives.supervised) or settings.init.get("method") == "labels"
    if by_labels and not labelled:
        raise DataError(
            "Supervised routing, and a router from labels, need rows that name their expert.",
            received=f"{len(rows)} rows in {settings.data.train!r}, none with one",
            remedy='Add "expert" to the rows, or leave objectives.supervised and init.method: labels out.',
        )
    if objectives.supervised and settings.trainer.get("packing"):
        raise ConfigurationError(
            "Texts whose expert is labelled are not packed.",
            received="objectives.supervised with trainer.packing",
            remedy="Leave one of them out.",
        )
    missing = set(config.adapters) - {row.expert for row in rows}
    if settings.init.get("method") == "labels" and missing:
        raise DataError(
            "A router from labels needs text of every expert.",
            received=f"no row of {', '.join(map(repr, sorted(missing)))} in {settings.data.train!r}",
            remedy="Add some, or use another init.method.",
        )


def _plan(
    settings: TrainSettings,
    arguments: Any,
    hollow: PreTrainedModel,
    config: XLoraConfig,
    experts: Sequence[Adapter],
    layers: int,
    rows: Sequence[Row],
    labelled: int,
    eval_rows: int,
    tokenizer: Any,
) -> Plan:
    weights = [module for expert in experts for module in expert.weights.values()]
    sizes = sizes_of(
        hollow,
        config,
        layers=layers,
        experts=sum(module.num_parameters for module in weights),
        ranks=sum(module.A.shape[0] for module in weights),
    )
    sample = [pieces(row, tokenizer, arguments.max_length) for row in rows[:64]]
    lengths = [len(piece) for found in sample for piece in found]
    longest = arguments.max_length if arguments.packing else max(lengths)
    batch = arguments.per_device_train_batch_size
    memory = training_memory(
        sizes,
        tokens=batch * longest,
        experts_train=config.use_trainable_adapters,
        checkpointing=arguments.activation_checkpointing or arguments.gradient_checkpointing,
    )
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    if steps is None and not arguments.packing:
        count = round(len(rows) * len(lengths) / len(sample))
        a_step = batch * arguments.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
        steps = int(-(-count // a_step) * arguments.num_train_epochs)
    return Plan(
        experts=list(config.adapters),
        layers=layers,
        router_parameters=sizes.router,
        base_parameters=sizes.base,
        rows=len(rows),
        labelled=labelled,
        eval_rows=eval_rows,
        steps=steps,
        memory=memory,
        cache_bytes=round(len(rows) * sum(lengths) / len(sample)) * sizes.hidden * sizes.itemsize,
    )


@dataclass(frozen=True)
class CheckedExpert:
    """Settings of a new expert that have passed, and what was read on the way."""

    config: LoraConfig
    arguments: Any
    tokenizer: Any
    rows: list[Row]
    dtype: torch.dtype


def check_expert(settings: ExpertSettings) -> CheckedExpert:
    """The same for a run that trains one LoRA expert.

    Raises:
        LoramixError: what would stop the run, with what to change.
    """
    base_config, tokenizer = _base_of(settings.base, settings.revision)
    arguments = _arguments(f"{settings.output}/training", settings.trainer, base_config)
    dtype = _dtype(settings.dtype, base_config)
    values: dict[str, Any] = {
        "target_modules": "all-linear",
        "r": 8,
        "lora_alpha": 16,
        "task_type": "CAUSAL_LM",
        **settings.lora,
    }
    check_keys(values, [entry.name for entry in fields(LoraConfig)], "lora")
    config = LoraConfig(base_model_name_or_path=from_anywhere(settings.base), revision=settings.revision, **values)
    new_targets(_hollow(base_config, dtype), config)
    rows = read_rows(settings.data.train, split=settings.data.split, subset=settings.data.subset)
    rows[0].as_text(tokenizer)
    return CheckedExpert(config, arguments, tokenizer, rows, dtype)
