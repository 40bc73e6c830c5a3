"""A run's settings held against its files, before any weight of the base model is loaded.

Paths, shapes, columns, arguments and memory: what would stop a run in its third hour stops it in its first second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loramix import checkpoint
from loramix.adapter import Adapter
from loramix.base_files import load_tokenizer, one_line
from loramix.checkpoint.mixture import classifier_shapes
from loramix.config import LoraConfig, XLoraConfig
from loramix.errors import ConfigurationError, DataError
from loramix.hub import from_anywhere
from loramix.inject import new_targets, plan
from loramix.model import hidden_size_of
from loramix.training.data import Row, read_rows
from loramix.training.objectives import RouterObjectives
from loramix.training.settings import ExpertSettings, TrainSettings, check_keys, read_prompts

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
        steps: optimizer steps; None where the trainer counts epochs of packed data.
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
    arguments = _arguments(settings.output, settings.trainer)
    base_config, tokenizer = _base_of(settings.base, settings.revision)
    dtype = _dtype(settings.dtype, base_config)
    hollow = _hollow(base_config, dtype)
    config = _mixture_config(settings, hollow)
    experts = [checkpoint.load_adapter(name, place) for name, place in config.adapters.items()]
    sites = plan(hollow, [replace(expert, base_weights={}) for expert in experts])
    config.validate_for(len(experts), hidden_size_of(hollow))
    rows = read_rows(settings.data.train, list(config.adapters), split=settings.data.split)
    eval_rows = [] if settings.data.eval is None else read_rows(settings.data.eval, split=settings.data.eval_split)
    rows[0].as_text(tokenizer)
    labelled = sum(row.expert is not None for row in rows)
    _check_labels(settings, objectives, config, rows, labelled)
    prompts = read_prompts(settings.init["prompts"]) if "prompts" in settings.init else None
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


def _arguments(output: str, trainer: Mapping[str, Any]) -> Any:
    from trl.trainer.sft_config import SFTConfig

    check_keys(trainer, [entry.name for entry in fields(SFTConfig)], "trainer")
    defaults = {
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    known = {entry.name for entry in fields(SFTConfig)}
    given: dict[str, Any] = {name: value for name, value in defaults.items() if name in known} | dict(trainer)
    try:
        return SFTConfig(output_dir=output, **given)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(
            "trainer holds arguments that TRL's SFTConfig takes.",
            received=f"{dict(trainer)!r}: {one_line(error)}",
            remedy="Correct them; https://huggingface.co/docs/trl/sft_trainer lists them.",
        ) from error


def _base_of(place: str, revision: str | None) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(place, revision)
    config = AutoConfig.from_pretrained(place, revision=revision or "main")
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
    base = sum(parameter.numel() for parameter in hollow.parameters())
    out = len(experts) * (layers if config.layerwise_scalings else 1)
    router = sum(map(math.prod, classifier_shapes(config, out).values()))
    expert_sizes = sum(module.num_parameters for expert in experts for module in expert.weights.values())
    size = hollow.dtype.itemsize
    sample = [len(tokenizer(row.as_text(tokenizer), verbose=False)["input_ids"]) for row in rows[:64]]
    average, longest = sum(sample) / len(sample), max(sample)
    length = min(longest, arguments.max_length or longest)
    batch = arguments.per_device_train_batch_size * length
    text = hollow.config.get_text_config()
    memory = {
        "base model": base * size,
        "experts": expert_sizes * (16 if config.use_trainable_adapters else size),
        "router, its gradients and Adam's moments": router * 16,
        "activations of one batch (estimate)": int(
            batch * (text.num_hidden_layers * 24 * config.hidden_size * size + 3 * 4 * text.vocab_size)
        ),
    }
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    if steps is None and not settings.trainer.get("packing"):
        rows_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        steps = int(-(-len(rows) // rows_a_step) * arguments.num_train_epochs)
    cache = int(len(rows) * average) * config.hidden_size * size
    return Plan(list(config.adapters), layers, router, base, len(rows), labelled, eval_rows, steps, memory, cache)


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
    arguments = _arguments(f"{settings.output}/training", settings.trainer)
    base_config, tokenizer = _base_of(settings.base, settings.revision)
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
    rows = read_rows(settings.data.train, split=settings.data.split)
    rows[0].as_text(tokenizer)
    return CheckedExpert(config, arguments, tokenizer, rows, dtype)
