"""The temperature of a router's softmax, chosen on text: a search in one dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loramix.errors import ConfigurationError, DataError
from loramix.evaluation.losses import text_nats
from loramix.model.build import XLoraModel
from loramix.passes.state import require_routing, state_of

FACTORS = (2.0, 1.0, 0.5, 0.25, 0.125)


def calibrate_temperature(model: XLoraModel, texts: Sequence[list[int]], *, batch: int = 8) -> float:
    """Set the softmax temperature T · f with the least loss on these texts, f one of 2, 1, 1/2, 1/4 and 1/8.

    A start in closed form takes the scale with which it predicts the expert; the sharpness that predicts the text best
    is another one, usually a higher one. The present temperature is one of those compared.

    Args:
        model: the mixture, a causal language model.
        texts: token ids of each, held out: not those that the router was made from.
        batch: texts in one forward.

    Returns:
        The temperature, which `save_pretrained` saves.

    Raises:
        ConfigurationError: scalings that no temperature changes.
        DataError: no token to predict.
    """
    require_routing(model)
    gating = state_of(model).gating
    if not gating.softmax:
        raise ConfigurationError(
            "The temperature is that of the softmax over all experts.",
            received=f"{gating}",
            remedy="Use enable_softmax=True.",
        )
    if not any(len(text) > 1 for text in texts):
        raise DataError(
            "A temperature is chosen on text of at least two tokens.",
            received=f"{len(texts)} texts, none of them so long",
            remedy="Give longer text.",
        )
    losses = dict[float, float]()
    try:
        for temperature in (gating.temperature * factor for factor in FACTORS):
            model.set_softmax_temperature(temperature)
            nats: Tensor = torch.cat(text_nats(model, texts, batch)).double()
            losses[temperature] = float(nats.sum())
    finally:
        model.set_softmax_temperature(gating.temperature)
    best = min(losses, key=losses.__getitem__)
    model.set_softmax_temperature(best)
    return best
