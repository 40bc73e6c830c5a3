"""Text with the routing that made it: for each token, how much of each expert wrote it.

S tokens, L adapted layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loramix.demo.text import encode, start_token
from loramix.model.build import XLoraModel


@dataclass(frozen=True)
class RoutedText:
    """A text, token by token, with the scalings of the forward that predicted each token, as a mean over the layers.

    Attributes:
        title: what the text is.
        tokens: the text of each token.
        weights: for each token, the weight of each expert.
        experts: the names of the experts.
        prompt: how many of the tokens were given; the model wrote the others.
        domains: for each token, the domain it comes from, where that is known.
    """

    title: str
    tokens: list[str]
    weights: list[list[float]]
    experts: list[str]
    prompt: int = 0
    domains: list[str] | None = None

    @property
    def leaders(self) -> list[str]:
        """The expert of the largest weight, for each token."""
        return [self.experts[max(range(len(row)), key=row.__getitem__)] for row in self.weights]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the written tokens that each expert leads."""
        leaders = self.leaders[self.prompt :]
        return {expert: leaders.count(expert) / max(1, len(leaders)) for expert in self.experts}


@torch.no_grad()
def route(
    model: XLoraModel,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    *,
    title: str,
    prompt: int = 0,
    domains: list[str] | None = None,
) -> RoutedText:
    """Run the mixture over a text and keep its routing.

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        ids: the tokens, the start token in front.
        title: what the text is.
        prompt: how many of the tokens after the start were given.
        domains: for each token after the start, the domain it comes from.
    """
    model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    weights = cast("list[list[float]]", scalings[0, :-1].float().mean(dim=1).tolist())
    tokens = [str(tokenizer.decode([token])) for token in ids[1:]]
    return RoutedText(title, tokens, weights, model.expert_names, prompt, domains)


@torch.no_grad()
def write(
    model: XLoraModel, tokenizer: PreTrainedTokenizerFast, prompt: str, *, title: str, tokens: int, seed: int
) -> RoutedText:
    """Let the mixture go on from a prompt (sampled, seeded) and keep its routing."""
    given = [start_token(tokenizer), *encode(tokenizer, prompt)]
    torch.manual_seed(seed)
    ids = torch.tensor([given], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        pad_token_id=start_token(tokenizer),
    )
    row = cast("list[int]", cast("Tensor", written)[0].tolist())
    return route(model, tokenizer, row, title=title, prompt=len(given) - 1)
