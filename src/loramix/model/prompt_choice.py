"""Choosing the experts' weights once per prompt, for `fix_routing(prompt=…, by=…)`.

B, S: batch, sequence. H: hidden size. E: experts. N: features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loramix.config.checks import require, require_finite, require_integer
from loramix.errors import ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.experts.base_layers import device_of
from loramix.experts.layer_use import TokenOrder
from loramix.layers.layer import XLoraLayer
from loramix.layers.routing import ConstantRouting, LayerRouting
from loramix.layers.slot import override
from loramix.layers.stack import ExpertStack
from loramix.model.peft_methods import layers_of
from loramix.passes.call import as_tokens
from loramix.passes.one_pass import by_text
from loramix.passes.state import MixtureState, evaluating, state_of
from loramix.routers.prompt import Signal, response_weights, similarity_weights


class PromptChoice(Protocol):
    """Chooses the experts' weights by a prompt."""

    def __call__(self, model: Any, prompt: Mapping[str, Tensor]) -> Float[Tensor, "B E"]:
        """The weights: a row for each prompt, over the experts in their order.

        Args:
            model: the mixture.
            prompt: a model input (`input_ids`, `attention_mask`, …), of one prompt or several.
        """
        ...


@dataclass(frozen=True)
class Responses:
    """Experts by how strongly they answer the prompt's last token, in one pass; without labels, texts or training.

        w_e = s_e / Σ s over the `top_k` largest,    s_e = ‖o_e‖  or  1 / entropy(softmax(o_e))

    o_e are the values c_e B_e A_e x that expert e adds at the last token in the chosen modules, one after the other.
    In that pass all experts act, each with the scaling 1 / E. The source looks at the query projection of the last
    block: `modules=["model.layers.31.self_attn.q_proj"]`.

    Args:
        top_k: experts that get a weight; None gives each expert one.
        signal: "norm" or "entropy".
        modules: paths of adapted modules; None takes those of the last block that has some.

    Raises:
        ConfigurationError: `top_k` below 1, or another signal. The call: `top_k` above E, or modules that are not
            adapted.
        UnsupportedOperationError (the call): an encoder–decoder.
        RoutingError (the call): a prompt that is all padding, modules that do not see its tokens, or that no expert
            answers.

    Source: LoGo, Lee et al., arXiv 2511.07129, section 3.
    """

    top_k: int | None = None
    signal: Signal = "norm"
    modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None:
            require_integer("top_k", self.top_k, at_least=1, remedy="Use for example top_k=2, or leave it out.")
        require(
            self.signal in ("norm", "entropy"),
            "An expert's signal is the norm of its answer, or its entropy.",
            received=f"signal={self.signal!r}",
            remedy='Use signal="norm" or signal="entropy".',
        )

    @torch.no_grad()
    def __call__(self, model: Any, prompt: Mapping[str, Tensor]) -> Float[Tensor, "B E"]:
        state = _checked(model)
        experts = len(state.names)
        require(
            self.top_k is None or self.top_k <= experts,
            "No more experts get a weight than there are.",
            received=f"top_k={self.top_k} for {experts} experts",
            remedy=f"Use top_k={experts} or less.",
        )
        layers = self._layers(model)
        real = real_tokens(prompt)
        last = real.int().cumsum(1).argmax(1)
        answers: dict[int, Tensor] = {}

        def uniform(number: int, low_rank: Tensor) -> Tensor:
            if number in layers:
                order = state.uses.orders.get(number, TokenOrder())
                missing = low_rank.new_empty(0)
                h = by_text(low_rank.unsqueeze(-2), real.shape, missing, order)
                if h is not missing:
                    at_last = h[torch.arange(len(last), device=h.device), last.to(h.device), 0]
                    answers[number] = _answers(layers[number].stack, at_last, experts)
            return low_rank.new_full((*low_rank.shape[:-1], experts), 1 / experts)

        weight = state.config.global_scaling_weight
        with evaluating(model), override(state, lambda: LayerRouting(uniform, weight)):
            model(**_on_device(model, prompt), use_cache=False)
        if not answers:
            raise RoutingError(
                "Experts answer a prompt in modules that see its tokens.",
                received=f"none of {', '.join(map(repr, (state.paths[n] for n in layers)))} saw tokens {[*real.shape]}",
                remedy="name other modules; where the adapters are disabled, call enable_adapter_layers() first",
            )
        found = [answers[number].to(answers[min(answers)].device) for number in sorted(answers)]
        return response_weights(torch.cat(found, dim=-1), self.signal, self.top_k)

    def _layers(self, model: Any) -> dict[int, XLoraLayer]:
        """The layers to look at, by number; those of a mixture-of-experts block have no one matrix for a token."""
        every = dict(enumerate(layers_of(model.get_base_model()).items()))
        usable = {number: (path, each) for number, (path, each) in every.items() if each.stack.lora_B.dim() == 2}
        if self.modules is None:
            block = next((found for path, _ in reversed(usable.values()) if (found := _block(path))), "")
            return {number: each for number, (path, each) in usable.items() if _block(path) == block}
        chosen = {number: each for number, (path, each) in usable.items() if path in self.modules}
        if len(chosen) != len(set(self.modules)) or not chosen:
            raise ConfigurationError(
                "Experts answer in modules that they adapt, with one matrix for all tokens.",
                received=f"modules={self.modules!r}",
                remedy="name some of model.adapted_modules, or leave modules out for those of the last block",
            )
        return chosen


@dataclass(frozen=True)
class Similarity:
    """Experts by how similar the prompt is to a few example texts of each.

        w = softmax(cos(p, m_e) / temperature) over the experts

    p is the mean of the base model's last hidden states over the prompt's tokens, m_e that over the tokens of the
    examples of expert e; from both is taken the mean of all m_e, which texts of any kind have in common.

    Args:
        means: m_e; `Similarity.to` makes them.
        temperature: of the softmax: lower is sharper.

    Raises:
        ConfigurationError: a temperature that is not positive. The call: means of another number of experts, or of
            another width.
        UnsupportedOperationError (the call): an encoder–decoder.
        RoutingError (the call): a prompt that is all padding.
    """

    means: Float[Tensor, "E H"]
    temperature: float = 0.1

    def __post_init__(self) -> None:
        require_finite("temperature", self.temperature, remedy="Use for example temperature=0.1.")
        require(
            self.temperature > 0,
            "The temperature of a softmax is positive.",
            received=f"temperature={self.temperature!r}",
            remedy="Use for example temperature=0.1.",
        )

    @classmethod
    def to(cls, model: Any, examples: Mapping[str, Mapping[str, Tensor]], temperature: float = 0.1) -> Self:
        """Read the examples of each expert, once.

        Args:
            model: the mixture.
            examples: expert name -> a model input (`input_ids`, `attention_mask`, …) of its texts; for every expert.
            temperature: as above.

        Raises:
            ConfigurationError: other names than the experts'.
            RoutingError: examples that are all padding.
        """
        names = _checked(model).names
        if set(examples) != set(names):
            raise ConfigurationError(
                "Every expert of the mixture has examples, and nothing else has.",
                received=f"examples for {', '.join(map(repr, examples)) or 'nobody'}",
                remedy=f"use the experts' names as keys: {', '.join(map(repr, names))}",
            )
        real = [real_tokens(examples[name]) for name in names]
        read = [_hidden(model, examples[name]) for name in names]
        means = [hidden[mask.to(hidden.device)].float().mean(0) for hidden, mask in zip(read, real, strict=True)]
        return cls(torch.stack(means), temperature)

    def __call__(self, model: Any, prompt: Mapping[str, Tensor]) -> Float[Tensor, "B E"]:
        names, real = _checked(model).names, real_tokens(prompt)
        hidden = _hidden(model, prompt)
        require(
            self.means.shape == (len(names), hidden.shape[-1]),
            "Examples are compared by the base model that read them, for each of its experts.",
            received=f"means of shape {tuple(self.means.shape)}",
            remedy=f"Use Similarity.to(model, …), for {', '.join(names)}.",
        )
        real = real.to(hidden.device).unsqueeze(-1)
        text = hidden.float().masked_fill(~real, 0.0).sum(1) / real.sum(1)
        means = self.means.to(text)
        return similarity_weights(text - means.mean(0), means - means.mean(0), self.temperature)


def real_tokens(prompt: Mapping[str, Tensor]) -> Bool[Tensor, "B S"]:
    """Which tokens of a model input are no padding.

    Raises:
        RoutingError: a text that is all padding, or an input without tokens.
    """
    mask = prompt.get("attention_mask")
    text = next((prompt[name] for name in ("input_ids", "inputs_embeds") if name in prompt), mask)
    if text is None or (mask is not None and mask.shape != text.shape[:2]):
        raise RoutingError(
            "Weights are chosen by the tokens of a prompt.",
            received=f"{ {name: tuple(value.shape) for name, value in prompt.items()} }",
            remedy="pass input_ids, and with padding an attention_mask of the same shape",
        )
    real = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if not bool(real.any(1).all()):
        raise RoutingError(
            "Weights are chosen by prompts that are not all padding.",
            received=f"an attention_mask without a token in row {int((~real.any(1)).nonzero()[0])}",
            remedy="pass input_ids and attention_mask of the same shape, with a token in each row",
        )
    return real


def _checked(model: Any) -> MixtureState:
    state = state_of(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedOperationError(
            "Weights are chosen by a prompt where one backbone reads it.",
            received=f"a {type(model).__name__}, whose encoder and decoder read a text each",
            remedy="fix the routing by scalings, or to the mean of a prompt's: leave by= out",
        )
    return state


@torch.no_grad()
def _hidden(model: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, "B S H"]:
    """The base model's last hidden states."""
    with evaluating(model), override(model._loramix, lambda: ConstantRouting(0.0)):
        return as_tokens(model.base_model(**_on_device(model, inputs), use_cache=False).last_hidden_state)


def _on_device(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device_of(model)) for name, value in inputs.items()}


def _answers(stack: ExpertStack, h: Float[Tensor, "B R"], experts: int) -> Float[Tensor, "B E N"]:
    """c_e B_e h_e of each expert; 0 of one that is absent."""
    up, of_rank = stack.whole("lora_B")[:, : stack.rank].float(), stack.expert_of_rank[: stack.rank]
    scaled = h.float() * stack.rank_scale[: stack.rank]
    members = torch.arange(experts, device=of_rank.device).unsqueeze(1) == of_rank
    return (scaled.unsqueeze(1) * members) @ up.T


def _block(path: str) -> str | None:
    """The path of the block that a module is in: up to the first number; None outside of blocks."""
    found = re.match(r".*?\.\d+(?=\.)", path)
    return found and found.group()
