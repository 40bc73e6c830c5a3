"""Fixed routing: inside a context, until further notice, or saved as one adapter.

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loramix import formats
from loramix.errors import ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.experts.base_layers import device_of
from loramix.experts.offload import KeptTensors, refuse_held
from loramix.layers.compress import single_adapter
from loramix.layers.routing import TensorRouting
from loramix.layers.slot import override
from loramix.model.own_weights import with_base_weights
from loramix.model.peft_methods import MixtureMethods, layers_of
from loramix.model.prompt_choice import PromptChoice
from loramix.passes.hooks import RouterOutput, RoutingHook
from loramix.passes.state import observing


class FixedMethods(MixtureMethods):
    """One pass per token, with scalings that are the same for every token."""

    def fixed_scalings(self, values: Tensor | Sequence[float]) -> AbstractContextManager[None]:
        """Inside, in this thread, one pass with the same final scalings for every token.

        Args:
            values: (E,), the same for all layers, or (L, E).

        Raises:
            RoutingError: another shape.
        """
        rows = self._checked_scalings(values)
        return override(self._loramix, lambda: self._loramix.routing(rows))

    def _checked_scalings(self, values: Tensor | Sequence[float]) -> Tensor:
        shapes = [(len(self.expert_names),), (len(self.adapted_modules), len(self.expert_names))]
        try:
            scalings = torch.as_tensor(values, dtype=torch.float32, device=device_of(self.get_base_model()))
        except (TypeError, ValueError, RuntimeError):
            scalings = torch.empty(0)
        if tuple(scalings.shape) not in shapes or not bool(torch.isfinite(scalings).all()):
            raise RoutingError(
                "Fixed scalings hold one finite number for each expert, or for each layer and expert.",
                received=f"{values!r}",
                remedy=f"pass shape {shapes[0]} for {', '.join(self.expert_names)}, or {shapes[1]}",
            )
        return scalings if scalings.dim() == 2 else scalings.unsqueeze(0)

    def fix_routing(
        self,
        scalings: Tensor | Sequence[float] | None = None,
        *,
        prompt: Mapping[str, Tensor] | None = None,
        by: PromptChoice | None = None,
        after: int | None = None,
    ) -> None:
        """One pass per token with the same scalings for every token, in every thread, until `unfix_routing()`.

        `save_pretrained` does not save the fixed scalings. `merge_and_unload()` merges the experts with them into the
        base model, and `save_fixed()` saves them as one adapter.

        Args:
            scalings: (E,), the same for all layers, or (L, E).
            prompt: a model input (`input_ids`, `attention_mask`, …): fix the mean of its tokens' final scalings.
            by: with a prompt: what chooses the weights by it instead, `Responses(…)` or `Similarity.to(…)`; of several
                prompts, the mean of their weights.
            after: in each generation, route this many tokens after the prompt, then fix the mean of their final
                scalings, separately for each row. Forwards outside `generate` still route each token. A cache that such
                a generation returns holds the mixture pass alone, and can be continued with fixed scalings only.

        Raises:
            ConfigurationError: none of scalings, prompt and after, or several; `after` below 1; `by` without a prompt.
            UnsupportedOperationError: `after` for a router that needs no scaling pass.
            RoutingError: scalings of another shape.
            LoramixError: what `by` raises.
        """
        if sum(given is not None for given in (scalings, prompt, after)) != 1 or (after is not None and after < 1):
            raise ConfigurationError(
                "Routing is fixed by scalings, from a prompt, or after a number of tokens: by one of them.",
                received=f"scalings={scalings!r}, prompt={prompt!r}, after={after!r}",
                remedy="pass for example fix_routing([0.5, 0.5]), or fix_routing(after=32)",
            )
        if by is not None and (prompt is None or not callable(by)):
            raise ConfigurationError(
                "by chooses weights by a prompt.",
                received=f"by={by!r}, prompt={prompt!r}",
                remedy="pass fix_routing(prompt=inputs, by=Responses(…)), or by=Similarity.to(…)",
            )
        if after is not None and not self._loramix.needs_scaling_pass:
            raise UnsupportedOperationError(
                "Fixing the routing after some tokens saves the scaling pass.",
                received=f"after={after} for router={self._loramix.config.router!r}, which needs none",
                remedy="fix the routing by scalings or from a prompt",
            )
        fixed = None
        if prompt is not None and by is not None:
            fixed = self._checked_scalings(by(self, prompt).mean(0))
        elif prompt is not None:
            before = self._loramix.fixed
            self._loramix.fixed = None  # the prompt is routed
            try:
                fixed = mean_scalings(self, prompt)
            finally:
                self._loramix.fixed = before
        elif scalings is not None:
            fixed = self._checked_scalings(scalings)
        self._loramix.fixed, self._loramix.fixed_after = fixed, after

    def unfix_routing(self) -> None:
        """Route each token again."""
        self._loramix.fixed = self._loramix.fixed_after = None

    @property
    def fixed_routing(self) -> Float[Tensor, "L E"] | None:
        """The scalings that `fix_routing` fixed, or None."""
        fixed = self._loramix.fixed
        return None if fixed is None else fixed.expand(len(self.adapted_modules), -1)

    def save_fixed(self, save_directory: str | PathLike[str], *, rank: int | None = None) -> float:
        """Save a mixture whose routing is fixed as one LoRA adapter, in PEFT's format.

        Args:
            save_directory: the folder.
            rank: the highest rank of a layer, by truncated SVD; None concatenates the experts, which is exact.

        Returns:
            The error of the truncation: the Frobenius norm of the difference of the weight updates, relative to that of
            the exact update.

        Raises:
            UnsupportedOperationError: the routing is not fixed, or an expert has DoRA or a bias.
            SaveError: the folder could not be written.
        """
        routing = self._loramix.single_pass()
        if not isinstance(routing, TensorRouting):
            raise UnsupportedOperationError(
                "One adapter holds a mixture whose scalings are the same for every token.",
                received=f"save_fixed() on a mixture of {', '.join(self.expert_names)}, which routes each token",
                remedy="call fix_routing(…) first, or use save_pretrained(folder)",
            )
        refuse_held(self.get_base_model())
        like = self._loramix.experts[0].config
        adapter, error = single_adapter(layers_of(self.get_base_model()), routing, like, rank=rank)
        model = self.get_base_model()
        formats.save_adapter(save_directory, with_base_weights(adapter, model, self._loramix, KeptTensors(model)))
        return error


class _Means(RoutingHook):
    """The mean of the final scalings of each stream of tokens, in the order of the forwards."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def routed(self, output: RouterOutput) -> None:
        mask, final = output.inputs.get("attention_mask"), output.final.detach()
        if mask is None:
            mask = torch.ones(final.shape[:2])
        if mask.shape != final.shape[:2] or not bool(mask.any()):
            raise RoutingError(
                "Scalings are fixed from a prompt that is not all padding.",
                received=f"scalings of shape {tuple(final.shape)} and a mask of shape {tuple(mask.shape)}",
                remedy="pass input_ids and attention_mask of the same shape",
            )
        self.means.append(final[mask.to(torch.bool)].mean(0))


@torch.no_grad()
def mean_scalings(model: Any, prompt: Mapping[str, Tensor]) -> Float[Tensor, "#L E"]:
    """The mean of a text's final scalings over its real tokens; for each layer, over those that it sees.

    Layers that are given their scalings keep them.
    """
    hook = _Means()
    with observing(model, hook):
        model(**{name: value.to(device_of(model)) for name, value in prompt.items()}, use_cache=False)
    if not hook.means:
        raise RoutingError(
            "Scalings are fixed from a prompt that is routed, token by token.",
            received="a mixture that makes no scalings at present",
            remedy="leave fixed_scalings(…) and disable_adapter() first",
        )
    state, layers = model._loramix, range(len(model.adapted_modules))
    if len(hook.means) == 1 and not state.config.elsewhere:
        return hook.means[0]
    of_encoder, of_decoder = (mean.expand(len(layers), -1) for mean in (hook.means[0], hook.means[-1]))
    own = [(of_encoder if layer in state.uses.seeing_encoder else of_decoder)[layer] for layer in layers]
    given = map(state.config.scalings_elsewhere, model.adapted_modules)
    return torch.stack([one if other is None else one.new_tensor(other) for one, other in zip(own, given, strict=True)])
