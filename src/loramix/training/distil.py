"""Distillation: a router that needs one pass learns from the router that a mixture has, on text without labels.

    D_s = Σ_e p_e (log p_e − log q_e), p the teacher's scalings before top-k, q the student's
    D_o = the same of the distributions of the next token

B, S: batch, sequence. L: adapted layers. E: experts. V: vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.config.checks import require_integer
from loramix.errors import ConfigurationError, DataError, UnsupportedOperationError
from loramix.experts.base_layers import device_of
from loramix.model.build import XLoraModel
from loramix.model.peft_methods import layers_of
from loramix.model.replace_router import config_with_router, replace_router, sizes_of_mixture
from loramix.passes.state import evaluating, require_routing, state_of
from loramix.passes.text_pass import embedded
from loramix.routers.evidence import EvidenceRouter
from loramix.routers.linear import LinearRouter, normalised
from loramix.routers.none import NoneGating
from loramix.routers.static import StaticRouter
from loramix.training.layer_start import (
    Batch,
    LayerPass,
    Moments,
    Nats,
    forward_with,
    inputs_of,
    real_tokens,
    uniform_scalings,
)

Student = EvidenceRouter | LinearRouter | StaticRouter
STUDENTS = (EvidenceRouter.kind, LinearRouter.kind, StaticRouter.kind)


@dataclass(frozen=True)
class Distillation:
    """What a distillation gave, on the held-out batches.

    Attributes:
        kind: the student's.
        start: D_o in nats a token of the mean teacher, which is where the student starts.
        closed_form: D_o of what was fitted to the scalings alone; None for `static`, which has no other.
        divergence: D_o of the student.
        scalings: D_s of the student, the mean over tokens and layers.
        agreement: the share of tokens and layers in which the student's largest expert is the teacher's.
        teacher: the teacher's loss, in nats a token.
        student: the student's.
        uniform: that of the uniform mixture.
        constant: whether the teacher's scalings hardly depend on the text.
    """

    kind: str
    start: float
    closed_form: float | None
    divergence: float
    scalings: float
    agreement: float
    teacher: float
    student: float
    uniform: float
    constant: bool

    @property
    def share(self) -> float | None:
        """The student's share of the teacher's gain over the uniform mixture; None where the teacher gains nothing."""
        gain = self.uniform - self.teacher
        return (self.uniform - self.student) / gain if gain > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, in JSON's types."""
        return {**asdict(self), "share": self.share}


def distil_router(
    model: XLoraModel, kind: str, batches: Sequence[Batch], *, steps: int = 100, learning_rate: float = 1e-2
) -> Distillation:
    """Give a mixture a router that needs one pass, in place of the one that it has.

    The student starts as the mean teacher: W = 0, and b the logarithm of the mean scalings, so that a constant teacher
    is met exactly. `static` is then done. `linear` is fitted by ridge regression onto the teacher's centred
    log-scalings, and then by Adam, which minimises D_o + D_s / 50: scalings count as far as they change what is
    predicted. `evidence` is fitted by Adam on D_s alone, which needs no more forwards of the model. Of all these the
    router with the least D_o on held-out batches is kept. Experts and gating stay.

    Args:
        model: the mixture, a causal language model; its router is the teacher.
        kind: "evidence", "linear" or "static".
        batches: `input_ids` and, where there is padding, `attention_mask`; at least two. The last fifth is held out.
        steps: of Adam for `linear`, each with one batch; 0 keeps the closed form.
        learning_rate: of Adam, at the first step; it falls to 0 as a cosine.

    Raises:
        ConfigurationError: another kind, a teacher whose scalings are no softmax, or settings that mean nothing for
            the student.
        DataError: fewer than two batches.
        UnsupportedOperationError: not a causal language model, or layers that no layer router scales.
        RoutingError: a mixture that makes no scalings at present.
    """
    require_routing(model)
    require_integer("steps", steps, at_least=0, remedy="Use for example steps=100.")
    _check(model, kind, batches)
    config, sizes = config_with_router(model, kind), sizes_of_mixture(model)
    count = max(1, len(batches) // 5)
    task = _Task(model, batches[:-count], batches[-count:])
    mean, spread = task.mean_teacher()
    constant = spread < _CONSTANT
    if constant and kind != "static":
        warnings.warn(
            f"The teacher's scalings hardly depend on the text ({spread:.1e} nats from their mean): "
            'distil_router(model, "static", …) gives the same, and merges into the base model.',
            stacklevel=2,
        )
    start = state_of(model).gating.temperature * mean.clamp_min(_SMALL).log()
    closed_form: float | None = None
    if kind == "static":
        config.layerwise_scalings |= _differ(start)
        student: Student = StaticRouter.build(config, sizes).to(device_of(model))
        student.assign(start if config.layerwise_scalings else start[0])
        first = found = task.score(student)
    else:
        if kind == "linear":
            student = LinearRouter.build(config, sizes).to(device_of(model))
            with torch.no_grad():
                student.bias.copy_(start)
        else:
            config.layerwise_scalings |= _differ(start)
            student = EvidenceRouter.build(config, sizes).to(device_of(model))
            with torch.no_grad():
                student.prior.copy_((start if config.layerwise_scalings else start[0]).flatten())
        first = found = task.score(student)
        fitted = copy.deepcopy(student)
        if isinstance(fitted, LinearRouter):
            task.fit(fitted)
        else:
            task.fit_text(fitted)
        fit = task.score(fitted)
        closed_form = fit.divergence
        if fit.divergence < found.divergence:
            student, found = fitted, fit
        if isinstance(student, LinearRouter):  # evidence that is fitted gained nothing by it, on two mixtures
            student, found = task.descend(student, found, steps, learning_rate)
    result = Distillation(
        kind,
        first.divergence,
        closed_form,
        *found,
        uniform=task.uniform_loss(),
        constant=constant,
    )
    replace_router(model, student, config)
    return result


def _differ(logits: Float[Tensor, "L E"]) -> bool:
    """Whether layers have different ones."""
    return bool((logits != logits[:1]).any())


def _check(model: XLoraModel, kind: str, batches: Sequence[Batch]) -> None:
    state = state_of(model)
    if kind not in STUDENTS:
        raise ConfigurationError(
            f"A router is distilled into one of {', '.join(STUDENTS)}.", received=f"{kind!r}", remedy='Use "evidence".'
        )
    if not state.gating.softmax:
        raise ConfigurationError(
            "What is distilled are scalings that a softmax makes.",
            received="a teacher with enable_softmax=False",
            remedy="train the student instead, on the language-model loss",
        )
    if isinstance(state.gating, NoneGating):
        raise ConfigurationError(
            "A student takes over the shares of experts, which sum to 1.",
            received=f"a teacher with gating={state.config.gating!r}, whose base model has a share",
            remedy="train the student instead, on the language-model loss",
        )
    if state.has_encoder or model.get_output_embeddings() is None:
        raise UnsupportedOperationError(
            "A router is distilled in a causal language model.",
            received=f"a {type(model).__name__}",
            remedy="train the student instead",
        )
    if len(batches) < 2:
        raise DataError(
            "A distillation trains on some batches, and holds some out.",
            received=f"{len(batches)} batches",
            remedy="Give at least two; a few dozen windows of text are better.",
        )


class _Score(NamedTuple):
    """In the order of `Distillation`."""

    divergence: float
    scalings: float
    agreement: float
    teacher: float
    student: float


class _Taught(NamedTuple):
    """What the teacher makes of a batch: its scalings (B, S, L or 1, E), and log-probabilities (B, S, V)."""

    scalings: Tensor
    predicted: Tensor


class _Task:
    """A mixture with its teacher, and the text.

    Args:
        model: the mixture.
        train: batches to fit to.
        held_out: batches to choose by.
    """

    def __init__(self, model: XLoraModel, train: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        self.model, self.train, self.held_out = model, train, held_out
        self.state = state_of(model)
        self.layers = len(model.adapted_modules)

    @torch.no_grad()
    def teach(self, batch: Batch) -> _Taught:
        """The teacher's forward."""
        with evaluating(self.model):
            logits = self.model(**inputs_of(self.model, batch), use_cache=False).logits
        scalings = self.model.get_latest_scalings()
        assert scalings is not None
        return _Taught(scalings, logits.float().log_softmax(-1))

    def mean_teacher(self) -> tuple[Float[Tensor, "L E"], float]:
        """The mean scalings, and the mean D_s of the scalings from them."""
        total, entropy, count = torch.zeros(1), torch.zeros(1), 0
        for batch in self.train:
            taught = self.teach(batch).scalings
            p = taught[real_tokens(batch).to(taught.device)].double()
            total, count = total.to(p) + p.sum(0), count + len(p)
            entropy = entropy.to(p) + torch.special.entr(p).sum()
        mean = total / max(1, count)
        spread = torch.special.entr(mean).sum() - entropy.sum() / max(1, count)
        return mean.float(), float(spread) / len(mean)

    def fit(self, student: LinearRouter) -> None:
        """Ridge regression onto the centred logarithm of the teacher's scalings, some of the uniform ones mixed in."""
        stacks = [layer.stack for layer in layers_of(self.model.get_base_model()).values()]
        experts = len(self.state.names)
        moments, passes = Moments([stack.rank for stack in stacks], experts), _LayerStudent(self.model, student)
        for batch in self.train:
            targets = ((1 - _MIXED_IN) * self.teach(batch).scalings + _MIXED_IN / experts).log()
            targets = targets - targets.mean(-1, keepdim=True)
            real = real_tokens(batch).to(targets.device)
            with torch.no_grad():
                passes.run(batch)
            for layer in range(self.layers):
                h = passes.activations(layer, real.shape)
                if h is not None:
                    moments.add(layer, normalised(h)[real], targets[:, :, layer][real])
        temperature = self.state.gating.temperature
        for layer in range(self.layers):
            weight, bias = moments.solve(layer)
            student.assign(layer, temperature * weight, temperature * bias)

    def fit_text(self, student: EvidenceRouter) -> None:
        """Adam on D_s, from embeddings and the teacher's scalings."""
        taught = [self.teach(batch).scalings for batch in self.train]
        kind, distinct = _TextStudent(self.model, student), slice(None) if student.distinct_layers > 1 else slice(1)
        optimizer, schedule = _adam(student.requires_grad_(True), _FIT_RATE, _FIT_STEPS)
        for step in range(_FIT_STEPS):
            number = step % len(self.train)
            real = real_tokens(self.train[number])
            with torch.enable_grad():
                q = self.state.gating.activate(kind.make(self.train[number]))
                p = taught[number][:, :, distinct].to(q.device).nan_to_num(0.0)  # of layers that saw other tokens
                loss = _divergence(p.clamp_min(_SMALL).log(), q.clamp_min(_SMALL).log())[real.to(q.device)].mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()

    def descend(
        self, student: LinearRouter, found: _Score, steps: int, learning_rate: float
    ) -> tuple[LinearRouter, _Score]:
        """Adam on D_o + D_s / 50; the best of what is met on the way."""
        best, student = student, copy.deepcopy(student)
        optimizer, schedule = _adam(student.requires_grad_(True), learning_rate, steps)
        parameters = list(student.parameters())
        passes = self._pass(student)
        for step in range(1, steps + 1):
            batch = self.train[step % len(self.train)]
            taught, real = self.teach(batch), real_tokens(batch)
            out = passes.run(batch, whole=True).logits.float().log_softmax(-1)
            real = real.to(out.device)
            scalings, _ = self._compared(passes, taught, real)
            loss = _divergence(taught.predicted, out)[real].mean() + scalings / 50
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            if step % _LOOK == 0 or step == steps:
                now = self.score(student)
                if now.divergence < found.divergence:
                    best, found = copy.deepcopy(student), now
        for parameter in best.parameters():
            parameter.grad = None
        return best, found

    @torch.no_grad()
    def score(self, student: Student) -> _Score:
        """The student on the held-out batches."""
        passes, own, teacher = self._pass(student), Nats(), Nats()
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for batch in self.held_out:
            taught, real = self.teach(batch), real_tokens(batch)
            logits = passes.run(batch, whole=True).logits
            real = real.to(logits.device)
            scalings, agreement = self._compared(passes, taught, real)
            outputs = _divergence(taught.predicted, logits.float().log_softmax(-1))[real].mean()
            sums += int(real.sum()) * torch.stack([outputs, scalings, agreement]).double().cpu()
            count += int(real.sum())
            own.add(logits, batch)
            teacher.add(taught.predicted, batch)
        divergence, scalings, agreement = (sums / max(1, count)).tolist()
        return _Score(divergence, scalings, agreement, teacher.mean, own.mean)

    @torch.no_grad()
    def uniform_loss(self) -> float:
        """The loss of the uniform mixture on the held-out batches."""
        passes, found = LayerPass(self.model, uniform_scalings(self.model)), Nats()
        for batch in self.held_out:
            found.add(passes.run(batch, whole=True).logits, batch)
        return found.mean

    def _pass(self, student: Student) -> _LayerStudent | _TextStudent:
        if isinstance(student, EvidenceRouter):
            return _TextStudent(self.model, student)
        return _LayerStudent(self.model, student)

    def _compared(self, passes: _LayerStudent | _TextStudent, taught: _Taught, real: Tensor) -> tuple[Tensor, Tensor]:
        """D_s and the agreement, the mean over tokens and layers, in the pass that the student has just made."""
        gating, divergences, agreements = self.state.gating, list[Tensor](), list[Tensor]()
        for layer in range(self.layers):
            logits = passes.logits(layer, real.shape)
            if logits is None:
                continue
            p, q = taught.scalings[:, :, layer], gating.activate(logits)
            if bool(p.isnan().any()):  # the teacher's layer saw other tokens
                continue
            divergences.append(_divergence(p.clamp_min(_SMALL).log(), q.clamp_min(_SMALL).log())[real].mean())
            agreements.append((p.argmax(-1) == q.argmax(-1))[real].float().mean())
        return torch.stack(divergences).mean(), torch.stack(agreements).mean()


class _LayerStudent(LayerPass):
    """One pass with a layer router."""

    def __init__(self, model: XLoraModel, student: LinearRouter | StaticRouter) -> None:
        gating = state_of(model).gating
        super().__init__(model, lambda layer, h: gating.select(gating.activate(student.layer_logits(layer, h))))
        self._student = student

    def logits(self, layer: int, tokens: torch.Size) -> Float[Tensor, "B S E"] | None:
        """Those of the last pass, by text; None for a layer that did not run, or saw other tokens."""
        h = self.activations(layer, tokens)
        return None if h is None else self._student.layer_logits(layer, h)


class _TextStudent:
    """One pass with a router of text."""

    def __init__(self, model: XLoraModel, student: EvidenceRouter) -> None:
        self._model, self._student, self._state = model, student, state_of(model)
        self._made: Tensor | None = None

    def make(self, batch: Batch) -> Float[Tensor, "B S distinct E"]:
        """The logits of a batch."""
        with torch.no_grad():
            x = embedded(self._model, inputs_of(self._model, batch)["input_ids"])
        real = real_tokens(batch).to(x.device)
        return self._student.distinct(self._student.read(x, real, torch.zeros_like(real), None))

    def run(self, batch: Batch, *, whole: bool = False) -> Any:
        """The forward of the backbone, or of the whole model; in evaluation mode."""
        gating, self._made = self._state.gating, self.make(batch)
        routing = self._state.routing(gating.select(gating.activate(self._made)))
        return forward_with(self._model, lambda: routing, batch, whole=whole)

    def logits(self, layer: int, tokens: torch.Size) -> Float[Tensor, "B S E"] | None:
        """Those of the last pass."""
        assert self._made is not None
        return self._made[:, :, layer if self._made.shape[2] > 1 else 0]


def _adam(
    student: Student, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, its rate falling to 0 as a cosine."""
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))


def _divergence(p: Float[Tensor, "*tokens n"], q: Float[Tensor, "*tokens n"]) -> Float[Tensor, "*tokens"]:
    """Σ p (log p − log q), from logarithms."""
    return (p.exp() * (p - q)).sum(-1)


_CONSTANT = 1e-4
"""Nats: below, the teacher counts as constant."""
_MIXED_IN = 0.05
"""Of the uniform scalings: logarithms of small scalings would outweigh all others."""
_SMALL = 1e-9
_LOOK = 25
_FIT_STEPS, _FIT_RATE = 300, 5e-3
