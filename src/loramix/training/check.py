"""Checks a run's settings against its files, before any weight of the base model is loaded.

Paths, shapes, columns, arguments and memory: what would stop a run after hours stops it in its first second.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from loramix import formats
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, DataError, SaveError
from loramix.experts.adapter import Adapter
from loramix.experts.dry_run import hidden_size_of
from loramix.experts.initialise import new_member
from loramix.experts.on_base import on_base
from loramix.experts.targets import new_targets
from loramix.files.base_models import without_weights
from loramix.files.hub import from_anywhere
from loramix.layers.inject import find_backbones, plan
from loramix.layers.tokens import check_uses
from loramix.model.checks import given_scalings
from loramix.routers import HiddenStateRouter, TextRouter, router_class
from loramix.routers.gating import gating_of
from loramix.routers.start import Method
from loramix.training.arguments import trainer_arguments
from loramix.training.base_model import dtype_of, read_base
from loramix.training.data import Row, read_rows
from loramix.training.initialise import Start, prompt_texts
from loramix.training.objectives import RouterObjectives, default_objectives
from loramix.training.overlap import warn_of_overlap
from loramix.training.plan import Plan, make_plan
from loramix.training.settings import ExpertSettings, TrainSettings, check_keys, expert_places, read_prompts

NEW_EXPERT: Mapping[str, Any] = {"target_modules": "all-linear", "r": 8, "lora_alpha": 16}
"""Fields of a new expert that trains alone, unless a run says others."""


@dataclass(frozen=True)
class CheckedRun:
    """Settings that passed the checks, and what was read on the way."""

    plan: Plan
    config: XLoraConfig
    objectives: RouterObjectives
    arguments: Any
    tokenizer: Any
    rows: list[Row]
    eval_rows: list[Row]
    prompts: dict[str, list[str]] | None
    start: Start
    dtype: torch.dtype


def check(settings: TrainSettings) -> CheckedRun:
    """Validate a run: paths, shapes, columns, arguments, memory; no weight of the base model is loaded.

    Raises:
        LoramixError: what would stop the run, with what to change.
    """
    base_config, tokenizer = read_base(settings.base, settings.revision)
    keeps = settings.data.eval is not None
    arguments = trainer_arguments(settings.output, settings.trainer, base_config, keeps_best=keeps)
    dtype = dtype_of(settings.dtype, base_config)
    base: PreTrainedModel = cast(Any, without_weights(base_config, causal=True)).to(dtype)
    config = _mixture_config(settings, base)
    objectives = _objectives(settings, config, arguments)
    experts = _experts(config, base)
    sites = plan(base, [on_base(base, replace(expert, base_weights={})) for expert in experts])
    kind = router_class(config)
    if not kind.trains:
        raise ConfigurationError(
            "A training has a router with parameters.",
            received=f"router={kind.kind!r}, which is made from the experts",
            remedy='use it untrained: get_peft_model(base, XLoraConfig(…)); or train router="linear"',
        )
    routed = issubclass(kind, HiddenStateRouter | TextRouter)
    names, given = list(config.adapters), given_scalings(config, sites)
    backbones = find_backbones(base, [site for site in sites if site.path not in given], names)
    check_uses(base, backbones, sites, names, routed=routed, given=given)
    data = settings.data
    rows = read_rows(data.train, list(config.adapters), split=data.split, subset=data.subset)
    eval_rows = [] if data.eval is None else read_rows(data.eval, split=data.eval_split, subset=data.subset)
    warn_of_overlap(eval_rows, rows)
    rows[0].as_text(tokenizer)
    _check_labels(settings, objectives, config, rows)
    prompts = None
    if "prompts" in settings.init:
        prompts = prompt_texts(read_prompts(settings.init["prompts"]), list(config.adapters))
    start = _start(settings, config, rows)
    if arguments.eval_strategy != "no" and not eval_rows:
        raise ConfigurationError(
            "An evaluation while training needs data to evaluate with.",
            received=f"trainer.eval_strategy={str(arguments.eval_strategy)!r} without data.eval",
            remedy="Add data.eval, or leave eval_strategy out.",
        )
    for place in (settings.output, settings.cache_folder):
        if place is not None:
            check_writable(Path(place))
    return CheckedRun(
        make_plan(base, config, experts, arguments, tokenizer, rows, sites, eval_rows=len(eval_rows), start=start),
        config,
        objectives,
        arguments,
        tokenizer,
        rows,
        eval_rows,
        prompts,
        start,
        dtype,
    )


def _start(settings: TrainSettings, config: XLoraConfig, rows: Sequence[Row]) -> Start:
    """The start that the settings name, or the best that the data and the kind of router have.

    Raises:
        ConfigurationError: the settings name one that this router does not have.
    """
    kind, experts = router_class(config), len(config.adapters)
    named: Start | None = settings.init.get("method")
    if named == "text" and config.new_experts:
        raise ConfigurationError(
            "A router starts from text without labels where experts predict it differently.",
            received=f"init.method: text, with new experts {', '.join(map(repr, config.new_experts))}",
            remedy="Use another init.method, or leave it out.",
        )
    if named is not None:
        if named != "random":
            kind.check_start(config, experts, named)
        return named
    # With zeros, top-k gives all tokens to the same few new experts, which then alone learn.
    found: list[Method] = [] if config.new_experts else ["zeros"]
    if "prompts" in settings.init:
        found.insert(0, "prompts")
    if {row.expert for row in rows} >= set(config.adapters):
        found.insert(0, "labels")
    for start in found:
        try:
            kind.check_start(config, experts, start)
        except ConfigurationError:
            continue
        return start
    return "random"


def _experts(config: XLoraConfig, base: PreTrainedModel) -> list[Adapter]:
    """The experts; new ones without values, since what is drawn here is not what the run draws."""
    own = copy.deepcopy(config)
    with torch.device("meta"):
        new = {name: new_member(base, own, name) for name in own.new_experts}
    return [new.get(name) or formats.load_adapter(name, place) for name, place in config.adapters.items()]


def _objectives(settings: TrainSettings, config: XLoraConfig, arguments: Any) -> RouterObjectives:
    check_keys(settings.objectives, [entry.name for entry in fields(RouterObjectives)], "objectives")
    default = default_objectives(list(config.new_experts), fp16=arguments.fp16)
    values: dict[str, Any] = {"load_balance": default.load_balance, **settings.objectives}
    if isinstance(values.get("temperature"), list):
        values["temperature"] = tuple(values["temperature"])
    return RouterObjectives(**values)


def check_writable(folder: Path) -> None:
    """Check that a folder can be made and written into; nothing is left behind.

    Raises:
        SaveError: it cannot.
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


def _mixture_config(settings: TrainSettings, base: PreTrainedModel) -> XLoraConfig:
    check_keys(settings.mixture, [entry.name for entry in fields(XLoraConfig)], "mixture")
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", **settings.mixture}
    places = expert_places(settings.experts)
    config = XLoraConfig(
        hidden_size=hidden_size_of(base),
        adapters={n: LoraConfig() if isinstance(place, dict) else from_anywhere(place) for n, place in places.items()},
        base_model_name_or_path=from_anywhere(settings.base),
        revision=settings.revision,
        **values,
    )
    config.validate_for(len(places), hidden_size_of(base))
    for name in config.new_experts:
        config.adapters[name] = _new_expert(config, cast("dict[str, Any]", places[name]))
    return config


def _new_expert(config: XLoraConfig, given: Mapping[str, Any]) -> LoraConfig:
    """A new expert with these fields.

    Without `lora_alpha`, c times its scaling in the uniform mixture is 2, as for an expert that trains alone: new
    experts begin to learn as one of their total rank does.
    """
    own = LoraConfig(**{**NEW_EXPERT, **given})
    gating, experts = gating_of(config), len(config.adapters)
    if "lora_alpha" not in given:
        scalings = gating.select(gating.activate(torch.full((1, 1, 1, experts), gating.uniform(experts))))
        size = math.sqrt(own.r) if own.use_rslora else own.r
        own.lora_alpha = _TWICE * size * round(1 / float(scalings.max()), 4)
    return own


_TWICE = 2


def _check_labels(
    settings: TrainSettings, objectives: RouterObjectives, config: XLoraConfig, rows: Sequence[Row]
) -> None:
    by_labels = bool(objectives.supervised) or settings.init.get("method") == "labels"
    if by_labels and all(row.expert is None for row in rows):
        raise DataError(
            "Supervised routing, and a router from labels, need rows that name their expert.",
            received=f"{len(rows)} rows in {settings.data.train!r}, none with one",
            remedy='Add "expert" to the rows, or leave objectives.supervised and init.method: labels out.',
        )
    labels = sorted({row.expert for row in rows if row.expert is not None})
    if objectives.supervised and len(labels) == 1 < len(config.adapters):
        warnings.warn(
            "Supervised routing learns from text of several experts.\n"
            f"  received: labels of {labels[0]!r} alone in {settings.data.train!r}: the router will learn to take it "
            "for every text\n"
            "  remedy: add labelled rows of the other experts, or leave objectives.supervised out",
            stacklevel=3,
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


@dataclass(frozen=True)
class CheckedExpertRun:
    """Settings of a new expert that passed the checks, and what was read on the way."""

    config: LoraConfig
    arguments: Any
    tokenizer: Any
    rows: list[Row]
    dtype: torch.dtype


def check_expert(settings: ExpertSettings) -> CheckedExpertRun:
    """Validate a run that trains one LoRA expert; no weight of the base model is loaded.

    Raises:
        LoramixError: what would stop the run, with what to change.
    """
    base_config, tokenizer = read_base(settings.base, settings.revision)
    arguments = trainer_arguments(f"{settings.output}/training", settings.trainer, base_config)
    dtype = dtype_of(settings.dtype, base_config)
    values: dict[str, Any] = {**NEW_EXPERT, "task_type": "CAUSAL_LM", **settings.lora}
    check_keys(values, [entry.name for entry in fields(LoraConfig)], "lora")
    config = LoraConfig(base_model_name_or_path=from_anywhere(settings.base), revision=settings.revision, **values)
    new_targets(without_weights(base_config, causal=True), config)
    rows = read_rows(settings.data.train, split=settings.data.split, subset=settings.data.subset)
    rows[0].as_text(tokenizer)
    return CheckedExpertRun(config, arguments, tokenizer, rows, dtype)
