"""The ordering file of mistral.rs, which runs mixtures in the original X-LoRA library's files. Written only.

    ordering.json       {"order": [names], "layers": {"model.layers.0.self_attn.q_proj": 0, …}, "base_model_id": …}

`layers` are the numbers of the adapted layers. They follow from the base model: no other file has them.

Source: github.com/EricLBuehler/mistral.rs, `scripts/create_ordering.py`, `orderings/`.
"""

from __future__ import annotations

import json

from loramix.errors import UnsupportedOperationError
from loramix.files.atomic import Writer, text_writer
from loramix.formats.format import MixtureFormat, register_format
from loramix.formats.mixture import MixtureCheckpoint
from loramix.formats.original import refuse_what_it_cannot_hold

ORDERING_NAME = "ordering.json"


class OrderingFormat(MixtureFormat):
    """mistral.rs's ordering file; it lies beside a mixture in the format "original", or elsewhere."""

    name = "mistral.rs"

    def writers(self, content: MixtureCheckpoint) -> dict[str, Writer]:
        refuse_what_it_cannot_hold(content)
        if not content.layers:
            raise UnsupportedOperationError(
                "The ordering file numbers the layers as the base model has them.",
                received="a mixture without the paths of its layers",
                remedy="convert a saved mixture: loramix convert FOLDER NEW --to original --base FOLDER_OR_HUB_ID",
            )
        ordering = {
            "order": [expert.name for expert in content.experts],
            "layers": {path: number for number, path in enumerate(content.layers)},
            "base_model_id": content.base_model,
        }
        return {ORDERING_NAME: text_writer(json.dumps(ordering, indent=2) + "\n")}


register_format(OrderingFormat())
