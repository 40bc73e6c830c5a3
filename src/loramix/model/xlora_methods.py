"""The methods that only a mixture has: reading its scalings, and changing its settings between forwards.

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.layers.slot import is_running, overriding
from loramix.model.fixed_routing import FixedMethods
from loramix.model.generation import LockstepMethods
from loramix.model.several import drop, mixtures_of, names_of, use
from loramix.routers.router import Router


class XLoraMethods(LockstepMethods, FixedMethods):
    """The methods that only a mixture has: reading its scalings, and changing its settings between forwards.

    A setter changes the model's own configuration. The change takes effect with the next forward, and is saved.
    """

    @property
    def router(self) -> Router:
        """The module that makes the logits: in X-LoRA the classifier, also known as `internal_xlora_classifier`."""
        return self._loramix.router

    @property
    def active_peft_config(self) -> XLoraConfig:
        """The live configuration."""
        return self._loramix.config

    @property
    def internal_xlora_scalings(self) -> Float[Tensor, "B S L E"] | None:
        """The scalings of the last forward, before top-k, detached; None before the first."""
        return self._loramix.latest

    def get_latest_scalings(self) -> Float[Tensor, "B S L E"] | None:
        """The same as `internal_xlora_scalings`."""
        return self._loramix.latest

    def set_topk_lora(self, value: int | None) -> None:
        """Keep the `value` largest scalings of each token; None keeps all.

        Raises:
            ConfigurationError: less than 1, or more than there are experts.
        """
        self._change(top_k_lora=value)

    def get_global_scaling_weight(self) -> float:
        """g, the factor on the experts' contribution."""
        return self._loramix.config.global_scaling_weight

    def set_global_scaling_weight(self, weight: float) -> None:
        """Change g.

        Raises:
            ConfigurationError: not a finite number.
        """
        self._change(global_scaling_weight=weight)

    def set_softmax_temperature(self, temperature: float) -> None:
        """Change the temperature of the softmax over the experts: lower is sharper.

        Raises:
            ConfigurationError: not a positive number.
        """
        self._change(softmax_temperature=temperature)

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Change every expert's scaling in the scaling pass; None means 1 / E.

        Raises:
            ConfigurationError: not a finite number.
        """
        self._change(scaling_pass_value=1 / len(self.expert_names) if value is None else value)

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of every forward from now on, up to the log's capacity."""
        self._loramix.log.enabled = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; logged scalings are kept."""
        self._loramix.log.enabled = False

    def clear_scalings_log(self) -> None:
        """Remove all logged scalings."""
        self._loramix.log.clear()

    def get_scalings_log(self) -> list[Float[Tensor, "B S L E"]]:
        """The logged scalings, oldest first, on the CPU; S differs from forward to forward."""
        return self._loramix.log.entries()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Float[Tensor, "B S L E"]]]]:
        """The logged scalings by S: their positions in the log, and the tensors."""
        return self._loramix.log.bucketed()

    @property
    def mixtures(self) -> list[str]:
        """The names of the mixtures on this base model; `load_mixture` adds one."""
        return names_of(self.get_base_model())

    def use_mixture(self, name: str) -> AbstractContextManager[None]:
        """Use another of the mixtures, in this thread: from now on, or, in a `with` statement, inside it.

        Whatever is done with the model is then done with that mixture: forwards, `generate`, settings, records,
        training and saving. A thread that has never chosen uses the first one.

        Args:
            name: one of `mixtures`.

        Raises:
            ConfigurationError: there is none of that name.
            RoutingError: in a forward, or inside `fixed_scalings(…)` or `disable_adapter()`, which belong to the
                mixture that was in use.
        """
        self._check_known(name)
        self._check_free(f"use_mixture({name!r})")
        return use(self.get_base_model(), name)

    def unload_mixture(self, name: str) -> None:
        """Drop a mixture, and free its memory.

        A thread that uses it gets an error at its next call. `unload()` takes out all of them.

        Args:
            name: one of `mixtures`, but for the one in use.

        Raises:
            ConfigurationError: there is none of that name.
            UnsupportedOperationError: it is in use in this thread, or will be at the end of a `with`.
        """
        self._check_known(name)
        mixtures = mixtures_of(self.get_base_model())
        if mixtures is None or name in mixtures.needed:
            raise UnsupportedOperationError(
                "A mixture is unloaded while another is in use.",
                received=f"{name!r}, which this thread uses",
                remedy="call use_mixture(…) with another one first, or unload() for the plain base model",
            )
        drop(self.get_base_model(), name)

    def _check_known(self, name: str) -> None:
        if name not in self.mixtures:
            raise ConfigurationError(
                "A mixture is named as it was loaded.",
                received=f"{name!r}, and mixtures {', '.join(map(repr, self.mixtures))}",
                remedy="name one of these, or call load_mixture(folder, name) first",
            )

    def _check_free(self, call: str) -> None:
        mixtures = mixtures_of(self.get_base_model())
        state = self._loramix if mixtures is None or mixtures.in_use in mixtures.members else None
        if is_running() or (state is not None and overriding(state) is not None):
            raise RoutingError(
                "The mixture is changed between forwards, and outside of what fixes or disables the one in use.",
                received=f"{call} in a forward, or inside fixed_scalings(…) or disable_adapter()",
                remedy="call it before, and put fixed_scalings(…) or disable_adapter() inside",
            )

    def _change(self, **fields: Any) -> None:
        trial = copy.copy(self._loramix.config)
        fields = {name: value.item() if hasattr(value, "item") else value for name, value in fields.items()}
        vars(trial).update(fields)
        trial.validate_for(len(self.expert_names), trial.hidden_size)
        vars(self._loramix.config).update(fields)
