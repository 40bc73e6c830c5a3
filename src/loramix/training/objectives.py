"""Router objectives for any trainer: auxiliary losses as a hook, the temperature schedule as a callback.

    trainer = Trainer(model, …, callbacks=[RouterCallback(RouterObjectives(z_loss=1e-3, supervised=1.0))])

The losses join the model's own in backward (`loramix.passes.hooks.join_gradient`), so that no trainer needs to know
them. The reported loss is the model's own; the values of the objectives are logged beside it.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, no_type_check

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import TrainerCallback

from loramix.analysis.metrics import LEAST, RoutingMeter, RoutingMetrics
from loramix.config.checks import require, require_finite
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, TrainingError
from loramix.passes.hooks import EXPERT_IDS, RouterOutput, RoutingHook
from loramix.passes.state import attach, state_of
from loramix.routers.gating import largest
from loramix.training import losses
from loramix.training.data import check_expert_ids

LOAD_BALANCE = 0.01
"""The weight of `load_balance` where experts are new, unless another is given (docs/training.md says how it was
chosen)."""


@no_type_check
@dataclass(frozen=True)
class RouterObjectives:
    """The weight of each objective beside the model's own loss; all are off by default.

    Args:
        z_loss: weight of `losses.z_loss`.
        load_balance: weight of `losses.load_balance`.
        entropy_floor: weight of `losses.entropy_floor`.
        least_entropy: its floor, a share of log E from 0 to 1.
        supervised: weight of `losses.supervised`, for texts whose expert the data names.
        temperature: the softmax temperature at the first and at the last step, geometric between them; None leaves it.

    Raises:
        ConfigurationError: a negative weight, a floor outside 0..1, a temperature that is not positive.
    """

    z_loss: float = 0.0
    load_balance: float = 0.0
    entropy_floor: float = 0.0
    least_entropy: float = 0.5
    supervised: float = 0.0
    temperature: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if name != "temperature"}
        for name, value in numbers.items():
            require_finite(name, value, remedy=f"Use {name}=0.0 to leave it out, or a positive weight.")
            require(
                value >= 0,
                f"{name} must not be negative.",
                received=f"{name}={value!r}",
                remedy=f"Use {name}=0.0 to leave it out.",
            )
        require(
            self.least_entropy <= 1,
            "least_entropy is a share of the largest entropy, from 0 to 1.",
            received=f"least_entropy={self.least_entropy!r}",
            remedy="Use least_entropy=0.5.",
        )
        ends = () if self.temperature is None else self.temperature
        require(
            self.temperature is None or (len(ends) == 2 and all(math.isfinite(end) and end > 0 for end in ends)),
            "temperature holds two positive numbers: at the first step and at the last.",
            received=f"temperature={self.temperature!r}",
            remedy="Use for example temperature=(4.0, 1.0), or None.",
        )

    def temperature_at(self, progress: float) -> float | None:
        """The softmax temperature at a share of the training, from 0 to 1."""
        if self.temperature is None:
            return None
        first, last = self.temperature
        return first * (last / first) ** min(1.0, max(0.0, progress))


class RouterObjective(RoutingHook):
    """The hook that adds the objectives to a model's training, and measures its routing.

    Args:
        objectives: the objectives.
        scale: the factor on the losses' gradients: 1 / n with n batches in an optimizer step.

    Attributes:
        metrics: the routing between the last two calls of `take`.
    """

    def __init__(self, objectives: RouterObjectives, scale: float = 1.0) -> None:
        self.objectives = objectives
        self.scale = scale
        self.meter = RoutingMeter()
        self.metrics: RoutingMetrics | None = None
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def routed(self, output: RouterOutput) -> Tensor | None:
        if not output.training:
            return None
        real = real_tokens(output)
        self.meter.add(output.final, real)
        terms = self._terms(output, real)
        for name, (_, value) in terms.items():
            self._values[name].append(value.detach())
        weighted = [weight * value for weight, value in terms.values() if weight]
        return self.scale * torch.stack(weighted).sum() if weighted else None

    def _terms(self, output: RouterOutput, real: Tensor | None) -> dict[str, tuple[float, Tensor]]:
        aims, terms = self.objectives, dict[str, tuple[float, Tensor]]()
        if aims.z_loss:
            terms["z_loss"] = aims.z_loss, losses.z_loss(output.logits, real)
        if aims.load_balance:
            chosen = largest(output.activated, output.gating.top_k or 1)
            terms["load_balance"] = aims.load_balance, losses.load_balance(_shares(output), chosen, real)
        if aims.entropy_floor:
            value = losses.entropy_floor(_shares(output), aims.least_entropy, real)
            terms["entropy_floor"] = aims.entropy_floor, value
        ids = output.inputs.get(EXPERT_IDS)
        if aims.supervised and ids is not None:
            terms["supervised"] = aims.supervised, losses.supervised(output.logits, self._checked(ids, output), real)
        return terms

    def _checked(self, ids: Tensor, output: RouterOutput) -> Tensor:
        batch, length = output.logits.shape[:2]
        if ids.shape not in ((batch,), (batch, length)):
            raise ConfigurationError(
                "expert_ids holds one number for each text of the batch, or for each token.",
                received=f"shape {tuple(ids.shape)} for a batch of {batch} texts of {length} tokens",
                remedy="do not pack texts whose expert is labelled, or label every token",
            )
        check_expert_ids(ids, output.logits.shape[-1])
        return ids.to(output.logits.device)

    def take(self) -> dict[str, float]:
        """The mean of each loss, and the routing metrics, since the last call."""
        values = {name: float(torch.stack(parts).mean()) for name, parts in self._values.items()}
        self._values.clear()
        self.metrics = self.meter.result()
        self.meter.clear()
        return values | ({} if self.metrics is None else self.metrics.scalars())


def _shares(output: RouterOutput) -> Tensor:
    return output.gating.shares(output.logits, output.activated)


def real_tokens(output: RouterOutput) -> Bool[Tensor, "B S"] | None:
    """True at the real tokens of a batch with padding; None where all are."""
    mask = output.inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != output.logits.shape[:2]:
        return None
    return mask.to(output.logits.device, torch.bool)


PREFIX = "router/"


class FiniteGradients(TrainerCallback):
    """Stops a training with gradients that are not finite, before they reach the weights.

    Raises (while training):
        TrainingError: a gradient that is not finite, with the step and where the checkpoints are.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not args.fp16:  # a loss scaler skips such steps by itself
            refuse_bad_gradients(model, state.global_step + 1, args.output_dir)


class RouterCallback(FiniteGradients):
    """Adds router objectives to `transformers.Trainer`, TRL's trainers, and others that call their callbacks.

    It attaches the objectives during the training, scales them with gradient accumulation, follows the temperature
    schedule, logs the routing metrics of the main process as `router/…`, and stops a training with gradients that are
    not finite, before they reach the weights.

    An objective is a mean over the batch of one process, and its gradient the mean over batches and processes:
    `entropy_floor` and `load_balance` bound the mean of each such batch.

    Where experts are new, it warns of those that are dead when the training ends (`dead_experts`).

    Args:
        objectives: the objectives; None takes those that a model has by default: `load_balance`, with the weight
            `LOAD_BALANCE`, where experts are new and there is no loss scaler; else none.

    Attributes:
        dead: the new mixture's dead experts by name, on the text since the last log, once the training has ended.

    Raises (while training):
        TrainingError: a gradient that is not finite, with the step and where the checkpoints are.
        ConfigurationError: objectives under a loss scaler (fp16).
    """

    def __init__(self, objectives: RouterObjectives | None = None) -> None:
        self._given = objectives
        self.objectives = objectives or RouterObjectives()
        self.dead: list[str] = []
        self._hook: RouterObjective | None = None
        self._detach: Callable[[], None] | None = None
        self._trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._given is None:
            self.objectives = default_objectives(state_of(model).new, fp16=args.fp16)
        if args.fp16 and any(asdict(replace(self.objectives, least_entropy=0.0, temperature=None)).values()):
            raise ConfigurationError(
                "Router objectives join the gradient past the loss scaler, which fp16 needs.",
                received=f"fp16=True with {self.objectives}",
                remedy="Train with bf16=True, or in float32.",
            )
        self._hook = RouterObjective(self.objectives)
        self._detach = attach(model, self._hook, alone=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._hook is not None:  # the last step of an epoch may have fewer batches, which the trainer alone knows
            batches = getattr(self._trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps)
            self._hook.scale = 1 / max(1, batches)
        temperature = self.objectives.temperature_at(state.global_step / max(1, state.max_steps - 1))
        if temperature is not None:
            model.set_softmax_temperature(temperature)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self._hook is None or logs is None or "loss" not in logs:
            return
        found = {PREFIX + name: value for name, value in self._hook.take().items()}
        logs.update(found)
        if state.log_history:
            cast("dict[str, float]", state.log_history[-1]).update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint and self.objectives.temperature is not None:
            restore_temperature(model, state.best_model_checkpoint)
        if self._hook is not None and state_of(model).new:
            metrics = self._hook.meter.result() or self._hook.metrics
            self.dead = [] if metrics is None else [model.expert_names[expert] for expert in metrics.dead]
            self.report()
        if self._detach is not None:
            self._detach()
        self._hook = self._detach = None

    def report(self) -> None:
        """Warn of dead experts."""
        if self.dead:
            warnings.warn(dead_experts(self.dead, "the last text of the training"), stacklevel=2)

    def first_of(self, trainer: Any) -> None:
        """Put this callback before those that report (TensorBoard, …), so that they log the metrics too.

        It also scales the objectives correctly in the last step of an epoch, which may have fewer batches.
        """
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)


def default_objectives(new: Sequence[str], *, fp16: bool = False) -> RouterObjectives:
    """The objectives of a training where none are given.

    Args:
        new: the experts that are new.
        fp16: whether there is a loss scaler, which no objective goes with.
    """
    return RouterObjectives(load_balance=LOAD_BALANCE if new and not fp16 else 0.0)


def dead_experts(names: Sequence[str], text: str) -> str:
    """What to say of dead experts, and what helps.

    Args:
        names: theirs.
        text: what they were not used on.
    """
    return (
        f"Dead experts, with a mean scaling below {LEAST} of the average on {text}: {', '.join(names)}. Train again "
        f"with a larger load_balance (by default {LOAD_BALANCE}), with a larger top_k_lora or none, or with fewer "
        "experts; or remove them with loramix edit."
    )


def restore_temperature(model: Any, folder: str | Path) -> None:
    """Set the softmax temperature of a checkpoint: trainers load its tensors only."""
    config = XLoraConfig.from_pretrained(str(folder))
    assert isinstance(config, XLoraConfig)
    model.set_softmax_temperature(config.softmax_temperature)


def refuse_bad_gradients(model: nn.Module, step: int, folder: str | None) -> None:
    """Check that all gradients are finite, before an optimizer step.

    Raises:
        TrainingError: they are not, with the step and the folder of the checkpoints.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is None or bool(torch.isfinite(parameter.grad).all()):
            continue
        raise TrainingError(
            "Every gradient is a finite number.",
            received=f"step {step}: the gradient of {name} is not; the weights are those of step {step - 1}",
            remedy=f"Resume from the last checkpoint in {folder!r} with a lower learning rate, or look at the data "
            "of that step.",
        )
