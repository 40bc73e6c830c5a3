"""A mixture for PEFT's own X-LoRA: PEFT's layout with PEFT's names, which PEFT 0.21.2 loads and runs. Written only.

    adapter_config.json             adapters: "0", "1", … -> where PEFT finds the expert, kept as it is
    adapter_model.safetensors       the classifier, every tensor of it
    0/ 1/ …                         each expert in PEFT's LoRA format

What PEFT cannot run, or computes otherwise, is refused. Read again, it is a mixture in the format "xlora".

Source: PEFT 0.21.2, `tuners/xlora/model.py`: the experts are called "0", "1", … whatever `adapters` calls them, and a
file's keys must begin with "model." below the base model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from loramix.config.folder import CONFIG_NAME
from loramix.errors import UnsupportedOperationError
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer, text_writer
from loramix.files.location import Location
from loramix.formats.format import register_format
from loramix.formats.mixture import MixtureCheckpoint, beyond_the_classifier, selects_in_the_scaling_pass
from loramix.formats.xlora import XLoraFormat

_BELOW = "model."


class PeftXLoraFormat(XLoraFormat):
    """PEFT's X-LoRA, for PEFT."""

    name = "peft"
    resumable = False

    def matches(self, location: Location) -> bool:
        return False

    def writers(self, content: MixtureCheckpoint) -> dict[str, Writer]:
        found = list(_beyond_peft(content))
        if found:
            raise UnsupportedOperationError(
                "PEFT's X-LoRA has X-LoRA's classifier and its gating, and experts called 0, 1, … of layers below "
                f"{_BELOW[:-1]!r}, with neither DoRA nor LoRA biases.",
                received="; ".join(found),
                remedy='save the mixture in the format "xlora" (loramix convert … --to loramix)',
            )
        config = copy.copy(content.config)
        config.hidden_size = int(config.hidden_size)
        return super().writers(content) | {CONFIG_NAME: text_writer(config.to_json())}


register_format(PeftXLoraFormat())


def _beyond_peft(content: MixtureCheckpoint) -> Iterator[str]:
    config = content.config
    yield from beyond_the_classifier(config)
    yield from (f"{name}=False" for name in ("use_bias", "enable_relu_and_dropout") if not getattr(config, name))
    if selects_in_the_scaling_pass(config):
        yield f"top_k_lora={config.top_k_lora} with scaling_pass_value={config.scaling_pass_value}"
    yield from (f"weights of its own: {name}" for name in content.base_weights)
    for number, expert in enumerate(content.experts):
        if expert.name != str(number):
            yield f"expert {number} called {expert.name!r}"
        yield from (f"expert {expert.name!r} with {what}" for what in _beyond_pefts_layers(expert))


def _beyond_pefts_layers(expert: Adapter) -> Iterator[str]:
    config = expert.config
    yield from (f"{name}=True" for name in ("use_dora", "lora_bias") if getattr(config, name))
    if config.target_parameters:
        yield f"target_parameters={config.target_parameters}"
    yield from (f"the layer {path!r}" for path in expert.weights if not path.startswith(_BELOW))
    adapted = {f"{path}.weight" for path in expert.weights}
    yield from (f"weights of the base model: {name}" for name in expert.base_weights if name not in adapted)
