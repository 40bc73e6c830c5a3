"""One call of a backbone's forward: its arguments by name, its cache, and how its result is handed back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.utils.generic import ModelOutput

from loramix._compat import CACHE, CACHES
from loramix.passes.hooks import EXPERT_IDS

Role = Literal["around", "backbone", "encoder", "decoder"]
"""What a model is in a mixture: it runs the passes as the only backbone, as the encoder or as the decoder; or it is
around those."""
KEEP = "logits_to_keep"
"""The argument of a forward that says which tokens go on to the head: the last ones, all if 0, or their numbers. Some
backbones drop the others before their last blocks."""
_QUIET = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}


@dataclass(frozen=True)
class ForwardSignature:
    """What a model's forward takes.

    Attributes:
        names: of its arguments, without `self`, in order.
        cache: the name of its cache.
        quiet: arguments for a pass whose last hidden states alone matter.
    """

    names: tuple[str, ...]
    cache: str
    quiet: dict[str, Any]

    @staticmethod
    def of(forward: Callable[..., Any]) -> ForwardSignature:
        """The signature of a forward, as a function of the model."""
        parameters = inspect.signature(forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        quiet = {name: value for name, value in _QUIET.items() if takes_any or name in parameters}
        cache = next((name for name in CACHES if name in parameters), CACHE)
        return ForwardSignature(tuple(parameters)[1:], cache, quiet)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name; the cache by the model's own name, whichever it was given by."""
        named = kwargs | dict(zip(self.names, args, strict=False))
        for name in CACHES:  # a name that the model no longer has: its own forward renames it as well
            if name not in self.names and named.get(name) is not None and named.get(self.cache) is None:
                named[self.cache] = named.pop(name)
        return named


@dataclass
class BackboneCall:
    """One call of the carrier's forward.

    Attributes:
        model: the carrier.
        role: whether it is an encoder or a decoder.
        forward: the forward of its own class.
        signature: of that forward.
        arguments: by name, without `expert_ids`.
        expert_ids: which expert each text belongs to, where the caller says so.
    """

    model: Any
    role: Role
    forward: Callable[..., Any]
    signature: ForwardSignature
    arguments: dict[str, Any]
    expert_ids: Tensor | None

    @property
    def training(self) -> bool:
        """Whether the carrier is in training mode."""
        return self.model.training

    @property
    def cache(self) -> Any:
        """The cache that the caller passed, or None."""
        return self.arguments.get(self.signature.cache)

    @property
    def keeps(self) -> int | Tensor | None:
        """The tokens whose last hidden states the caller wants: the last ones, or some by index. None: all."""
        keep = self.arguments.get(KEEP)
        return None if isinstance(keep, int) and keep == 0 else keep

    def tokens(self, out: Any) -> torch.Size:
        """(B, S), of the text rather than of those that are kept.

        Args:
            out: the output.
        """
        texts = (self.arguments.get(name) for name in ("input_ids", "inputs_embeds"))
        text = next((text for text in texts if text is not None), None)
        return (as_tokens(out.last_hidden_state) if text is None or self.keeps is None else text).shape[:2]

    @property
    def hook_inputs(self) -> Mapping[str, Any]:
        """The arguments as hooks see them."""
        return self.arguments if self.expert_ids is None else self.arguments | {EXPERT_IDS: self.expert_ids}

    def run(self) -> Any:
        """The mixture's own pass; the result is a `ModelOutput`, whatever the caller asked for."""
        as_output = {"return_dict": True} if "return_dict" in self.signature.quiet else {}
        return self.forward(self.model, **(self.arguments | as_output))

    def returned(self, out: ModelOutput) -> Any:
        """The result as the caller asked for it: a tuple with `return_dict=False`."""
        asked = self.arguments.get("return_dict", getattr(self.model.config, "return_dict", True))
        return out.to_tuple() if asked is False else out


def as_tokens(hidden: Tensor) -> Float[Tensor, "B S H"]:
    """Last hidden states by token; a convolutional network's (B, H, height, width) by position."""
    return hidden if hidden.dim() == 3 else hidden.flatten(2).transpose(1, 2)


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, or in its output; None where there is none."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
