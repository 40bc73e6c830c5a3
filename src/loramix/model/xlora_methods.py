"""The methods that only a mixture has: reading its scalings, and changing its settings between forwards.

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

import copy
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loramix.config.xlora import XLoraConfig
from loramix.model.fixed_routing import FixedMethods
from loramix.model.generation import LockstepMethods
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

    def _change(self, **fields: Any) -> None:
        trial = copy.copy(self._loramix.config)
        fields = {name: value.item() if hasattr(value, "item") else value for name, value in fields.items()}
        vars(trial).update(fields)
        trial.validate_for(len(self.expert_names), trial.hidden_size)
        vars(self._loramix.config).update(fields)
