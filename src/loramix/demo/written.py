"""Text that the mixture generates after a prompt, with the routing of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from loramix.analysis.show.live import WrittenToken, stream_routing
from loramix.demo.text import encode, start_token
from loramix.model.build import XLoraModel


@dataclass(frozen=True)
class WrittenText:
    """A text that the mixture generated.

    Attributes:
        title: its title.
        prompt: the text that it continues.
        tokens: the generated tokens, each with the routing of the forward that predicted it.
        experts: the names of the experts.
    """

    title: str
    prompt: str
    tokens: list[WrittenToken]
    experts: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON's types."""
        return {**vars(self), "tokens": [token._asdict() for token in self.tokens]}


@torch.no_grad()
def write(
    model: XLoraModel, tokenizer: PreTrainedTokenizerFast, prompt: str, *, title: str, tokens: int, seed: int
) -> WrittenText:
    """Let the mixture continue a prompt (sampled, seeded), and keep its routing."""
    ids = torch.tensor([[start_token(tokenizer), *encode(tokenizer, prompt)]], device=model.device)
    torch.manual_seed(seed)
    with stream_routing(model, tokenizer, Console(quiet=True)) as streamer:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.6,
            top_p=0.9,
            pad_token_id=start_token(tokenizer),
            streamer=streamer,
        )
    return WrittenText(title, prompt, list(streamer.tokens), model.expert_names)
