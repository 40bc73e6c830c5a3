"""The causal ceiling: what a router could reach that is not told which expert a text belongs to.

N: predicted tokens of a text; the first token is given, not predicted. E: experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.config.checks import require
from loramix.evaluation.losses import text_nats, token_nats
from loramix.evaluation.passages import Passage, pad
from loramix.evaluation.scores import Score, by_group
from loramix.experts.base_layers import device_of
from loramix.layers.slot import override
from loramix.model.build import XLoraModel
from loramix.passes.state import evaluating, state_of


@dataclass(frozen=True)
class Ceiling:
    """Scores by group of text.

    Attributes:
        scalings: of the mixture whose scalings are the posterior.
        probabilities: of the experts' predictions, averaged with the posterior; no mixture of low-rank terms does that.
    """

    scalings: dict[str, Score]
    probabilities: dict[str, Score]


def posterior(nats: Float[Tensor, "N E"], change: float = 0.0) -> Float[Tensor, "N+1 E"]:
    """The probability of each expert, given the text up to each token.

        w(0) = 1 / E;  w_e(t) ∝ v_e(t − 1) p_e(x_t | x_<t);  v = (1 − change) w + change / E

    Args:
        nats: −ln p_e of each token after the first.
        change: the probability that the text becomes another expert's after a token; 0 where each text is of one.

    Raises:
        ConfigurationError: `change` outside [0, 1).
    """
    require(
        0 <= change < 1,
        "change is a probability below 1.",
        received=f"change={change!r}",
        remedy="Use change=0.0 where each text belongs to one expert, or for example 0.01.",
    )
    experts = nats.shape[-1]
    log_w = torch.full((experts,), -math.log(experts), dtype=torch.float64)
    found = [log_w]
    for row in nats.double():
        w = torch.softmax(log_w - row, -1)
        log_w = torch.log((1 - change) * w + change / experts)
        found.append(log_w)
    return torch.softmax(torch.stack(found), -1).float()


@torch.no_grad()
def causal_ceiling(model: XLoraModel, passages: Sequence[Passage], *, change: float = 0.0, batch: int = 8) -> Ceiling:
    """Mix the experts by `posterior`: by their likelihoods of the text so far.

    It is what evidence about the text's expert is worth, not a bound: a mixture can beat its best expert.

    Args:
        model: a mixture on a causal language model; its router is not asked.
        passages: the text.
        change: as in `posterior`.
        batch: passages in one forward.
    """
    texts, names, state = [passage.ids for passage in passages], model.expert_names, state_of(model)
    alone = list[list[Tensor]]()
    for chosen in names:
        with model.fixed_scalings([float(name == chosen) for name in names]):
            alone.append(text_nats(model, texts, batch))
    nats = [torch.stack(rows, dim=-1) for rows in zip(*alone, strict=True)]
    weights, mixed = [posterior(rows, change) for rows in nats], list[Tensor]()
    device = device_of(model)
    with evaluating(model):
        for i in range(0, len(texts), batch):
            ids, real = (tensor.to(device) for tensor in pad(texts[i : i + batch]))
            rows = [torch.nn.functional.pad(w, (0, 0, 0, ids.shape[1] - len(w))) for w in weights[i : i + batch]]
            routing = state.routing(torch.stack(rows).unsqueeze(2).to(device))
            with override(state, lambda routing=routing: routing):
                logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
            found = token_nats(logits, ids).cpu()
            mixed += [row[: len(text) - 1] for row, text in zip(found, texts[i : i + batch], strict=True)]
    averaged = [-torch.logsumexp(w[:-1].log() - n, -1) for w, n in zip(weights, nats, strict=True)]
    return Ceiling(by_group(mixed, passages), by_group(averaged, passages))
