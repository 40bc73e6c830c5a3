"""A tiny causal language model whose tokens pass through convolutions: no model of transformers' own has them so."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from support.tiny import HIDDEN, VOCABULARY


class ConvolutionConfig(PreTrainedConfig):
    model_type = "tiny-convolution"
    hidden_size = HIDDEN
    vocab_size = VOCABULARY


class ConvolutionModel(PreTrainedModel):
    """A causal convolution over three tokens, then one over each token alone, as (B, H, S, 1) maps."""

    config_class = ConvolutionConfig

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.conv = nn.Conv2d(HIDDEN, HIDDEN, (3, 1))
        self.mix = nn.Conv2d(HIDDEN, HIDDEN, 1)
        self.norm = nn.LayerNorm(HIDDEN)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **_: Any) -> BaseModelOutput:
        x = self.embed(input_ids).transpose(1, 2).unsqueeze(-1)
        x = x + torch.tanh(self.conv(F.pad(x, (0, 0, 2, 0))))
        x = x + self.mix(x)
        return BaseModelOutput(last_hidden_state=self.norm(x.squeeze(-1).transpose(1, 2)))


class ConvolutionForCausalLM(PreTrainedModel):
    config_class = ConvolutionConfig
    base_model_prefix = "model"

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__(config)
        self.model = ConvolutionModel(config)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids=input_ids).last_hidden_state))


def tiny_convolution() -> PreTrainedModel:
    torch.manual_seed(0)
    model = ConvolutionForCausalLM(ConvolutionConfig()).eval()
    with torch.no_grad():
        for layer in (model.model.conv, model.model.mix):  # transformers starts them too small to be seen
            layer.weight.normal_(std=0.1)
    return model
