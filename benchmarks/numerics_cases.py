"""The models whose numerics are frozen: tiny ones, with random weights, and the demo's mixture.

Of loramix only its public names are used, so that the file means the same however the package is arranged. The
experts of the mixtures are written by PEFT and the routers are filled here: none of their weights is drawn by the code
under test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from loramix import LoraConfig, XLoraConfig, demo, get_peft_model

ROUTER = "internal_xlora_classifier."
VOCABULARY, HIDDEN = 96, 64
PAD = 0
Inputs = dict[str, Tensor]
Settings = dict[str, Any]

_COMMON: Settings = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
_BLOCKS: Settings = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # with transformers' own a tiny model says nearly the same after every text
    **_COMMON,
}
_GATED: Settings = {"intermediate_size": 96, "num_key_value_heads": 2, **_BLOCKS}


@dataclass(frozen=True)
class Case:
    """A model to look at.

    Args:
        name: of its group in the file.
        base: its base model, new at each call.
        build: (base, an empty folder) -> the model with its experts.
        batch: two rows, the first one padded on the left.
        row: one row, which repeats itself.
        fills_router: whether `fill_router` is to give the router other weights than it starts with.
        one_adapter: whether the mixture with fixed routing is also saved as one adapter.
    """

    name: str
    base: Callable[[], Any]
    build: Callable[[Any, Path], Any]
    batch: Inputs
    row: Inputs
    fills_router: bool = False
    one_adapter: bool = False


def llama(**changes: Any) -> PreTrainedModel:
    """Grouped-query attention, SwiGLU, RMSNorm."""
    return _base(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**_GATED, **changes}))


def qwen3(**changes: Any) -> PreTrainedModel:
    """Normalised queries and keys."""
    return _base(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**{**_GATED, "head_dim": 16, **changes}))


def mistral(**changes: Any) -> PreTrainedModel:
    """A sliding window of six tokens in every block."""
    return _base(transformers.MistralForCausalLM, transformers.MistralConfig(**{**_GATED, "sliding_window": 6}))


def gemma3() -> PreTrainedModel:
    """A sliding window of four tokens in one block, scaled and tied embeddings."""
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    return _base(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**_GATED, **windows))


def phi() -> PreTrainedModel:
    """Attention and feed-forward side by side, rotary embeddings of half of each head, biases."""
    return _base(transformers.PhiForCausalLM, transformers.PhiConfig(**_GATED))


def opt() -> PreTrainedModel:
    """A decoder below the backbone, layers that see flattened tokens, dropout of the base model's own."""
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN, "init_std": 0.1}
    return _base(transformers.OPTForCausalLM, transformers.OPTConfig(**_BLOCKS, **sizes))


def gpt2() -> PreTrainedModel:
    """Conv1D layers, whose weights are stored as (in, out); dropout of the base model's own."""
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
    return _base(transformers.GPT2LMHeadModel, transformers.GPT2Config(**_COMMON, **sizes))


def convolution() -> PreTrainedModel:
    """Convolutions over tokens: no model of transformers' own has them so."""
    return _base(ConvolutionForCausalLM, ConvolutionConfig())


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

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **_: Any) -> CausalLMOutput:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def _base(kind: Callable[[Any], Any], config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # transformers starts them too small to be seen
            nn.init.normal_(module.weight, std=0.1)
    return model


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def _experts(targets: list[str], **settings: Any) -> list[Settings]:
    """Three experts of ranks 2, 3 and 4, and alphas 4, 6 and 8."""
    return [{"r": 2 + i, "lora_alpha": 4 + 2 * i, "target_modules": targets, **settings} for i in range(3)]


def _many(number: int) -> list[Settings]:
    """Experts of rank 4 on two layers: with 32 of them a layer has 128 rank columns, and few of these count."""
    return [{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} for _ in range(number)]


def _ragged() -> list[Settings]:
    """Experts of different layers, with patterns of ranks and alphas, and rsLoRA."""
    patterns = {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {r"layers\.1\.self_attn\.o_proj": 32}}
    layers = [{"use_rslora": True, "target_modules": ["q_proj", "v_proj"]}, patterns, {"layers_to_transform": [1]}]
    return [
        {**expert, "lora_dropout": 0.1, **changes} for expert, changes in zip(_experts(LINEARS), layers, strict=True)
    ]


def _mixed(targets: list[str], *changes: Settings, **settings: Any) -> list[Settings]:
    """Three experts, each with changes of its own."""
    return [{**expert, **own} for expert, own in zip(_experts(targets, **settings), changes, strict=True)]


SPARSE: Settings = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}
HARD: Settings = {"enable_softmax": False, "top_k_lora": 1}
LAYERWISE: Settings = {"layerwise_scalings": True}
DEEP: Settings = {"xlora_depth": 3, "xlora_size": 16}
TRAINABLE: Settings = {"use_trainable_adapters": True, "xlora_depth": 2, "xlora_size": 16}
DROPOUTS: tuple[Settings, ...] = ({"lora_dropout": 0.0}, {"lora_dropout": 0.1}, {"lora_dropout": 0.3})


def cases() -> list[Case]:
    """All of them, in the order of the report."""
    dora: Settings = {"use_dora": True}
    bias: Settings = {"lora_bias": True}
    fan = {"fan_in_fan_out": True}
    fc = ["q_proj", "v_proj", "fc1", "fc2"]
    conv1d = ["c_attn", "c_proj", "c_fc"]
    window = ["embed_tokens", "q_proj", "v_proj", "up_proj"]
    ends = {"eos_token_id": [5, 17, 40, 60]}
    half = torch.bfloat16
    dropping = partial(llama, attention_dropout=0.1)
    return [
        _mixture("llama dense", dropping, _ragged(), {}, one_adapter=True),
        _mixture("llama dense layerwise depth 3", llama, _experts(LINEARS), {**LAYERWISE, **DEEP}),
        _mixture("llama sparse", llama, _experts(LINEARS), {**SPARSE, **DEEP, "global_scaling_weight": 0.7}),
        _mixture("llama sparse layerwise", llama, _ragged(), {**SPARSE, **LAYERWISE, "scaling_pass_value": 0.3}),
        _mixture("llama hard", llama, _experts(ATTENTION), {**HARD, "xlora_depth": 2, "xlora_size": 16}),
        _mixture("llama hard layerwise", llama, _experts(ATTENTION), {**HARD, **LAYERWISE, "top_k_lora": 2}),
        _mixture("llama trainable", llama, _mixed(LINEARS, *DROPOUTS), TRAINABLE),
        _mixture("llama trainable DoRA", llama, _mixed(ATTENTION, dora, {}, dora, lora_dropout=0.1), TRAINABLE),
        _mixture("llama bfloat16", llama, _experts(LINEARS), {**LAYERWISE}, dtype=half),
        _mixture("llama bfloat16 trainable", llama, _mixed(LINEARS, *DROPOUTS), {**TRAINABLE, **SPARSE}, dtype=half),
        _mixture("qwen3 temperature", partial(qwen3, **ends), _experts(LINEARS), {"softmax_temperature": 0.5, **DEEP}),
        _mixture("gemma3 embedding", gemma3, _experts(window), {**LAYERWISE, "softmax_temperature": 2.0}),
        _mixture("gemma3 embedding trainable", gemma3, _experts(window), {**TRAINABLE, **SPARSE}),
        _mixture(
            "mistral window", mistral, _experts(LINEARS), {"scaling_pass_value": 0.5, "global_scaling_weight": 1.5}
        ),
        _mixture("phi", phi, _experts([*ATTENTION[:3], "dense", "fc1"]), {**LAYERWISE, **HARD}),
        _mixture("opt bias trainable", opt, _mixed(fc, {}, bias, {}, lora_dropout=0.1), {**TRAINABLE, **LAYERWISE}),
        _mixture("gpt2", gpt2, _experts(conv1d, **fan), SPARSE),
        _mixture("gpt2 DoRA bias", gpt2, _mixed(conv1d, dora, bias, {}, **fan), {**TRAINABLE, **LAYERWISE}),
        _mixture("convolution", convolution, _mixed(["conv", "mix", "embed"], {}, {}, {}, lora_dropout=0.1), TRAINABLE),
        _mixture("convolution bias", convolution, _mixed(["conv", "mix"], {}, bias, {}), {**LAYERWISE, **HARD}),
        _mixture("32 experts layerwise", llama, _many(32), {**SPARSE, **LAYERWISE}),
        _mixture("32 experts shared", llama, _many(32), {**HARD, **DEEP}),
        _mixture("32 experts bfloat16", llama, _many(32), {**HARD, **LAYERWISE}, dtype=half),
        _plain("LoRA", llama, {"target_modules": LINEARS, "lora_dropout": 0.1}),
        _plain("LoRA embedding", gemma3, {"target_modules": window, "use_rslora": True, "init_lora_weights": False}),
        _plain("LoRA bias", opt, {"target_modules": fc, "lora_bias": True, "init_lora_weights": False}),
        _plain("DoRA", gpt2, {"target_modules": conv1d, **dora, **fan, "init_lora_weights": False}),
        _demo(),
    ]


def _texts(vocabulary: int) -> dict[str, Inputs]:
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(4, vocabulary, (2, 9), generator=generator)
    batch[0, :3] = PAD
    row = torch.randint(4, vocabulary, (1, 5), generator=generator).repeat(1, 3)
    return {
        "batch": {"input_ids": batch, "attention_mask": (batch != PAD).long()},
        "row": {"input_ids": row, "attention_mask": torch.ones_like(row)},
    }


def _mixture(
    name: str,
    base: Callable[[], Any],
    experts: list[Settings],
    router: Settings,
    *,
    dtype: torch.dtype = torch.float32,
    one_adapter: bool = False,
) -> Case:
    def new() -> Any:
        return base().to(dtype)

    def build(model: Any, folder: Path) -> Any:
        adapters = {f"expert-{i}": _write(folder / str(i), base(), i, **of) for i, of in enumerate(experts)}
        with warnings.catch_warnings(action="ignore"):
            config = XLoraConfig(hidden_size=HIDDEN, adapters=adapters, **router)
        torch.manual_seed(4)
        return get_peft_model(model, config).eval()

    return Case(name, new, build, **_texts(VOCABULARY), fills_router=True, one_adapter=one_adapter)


def _plain(name: str, base: Callable[[], Any], settings: Settings) -> Case:
    def build(model: Any, folder: Path) -> Any:
        torch.manual_seed(4)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **settings)).eval()

    return Case(name, base, build, **_texts(VOCABULARY))


def _demo() -> Case:
    def build(model: Any, folder: Path) -> Any:
        mixture = demo.load()[0]
        mixture.get_submodule(ROUTER[:-1]).requires_grad_(True)
        return mixture

    tokenizer = demo.tokenizer()
    texts = ["The method returns", "Question: Ada has 57 books and gets 68 more. How many books does Ada have now?\n"]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    row = dict(tokenizer("def read_lines(path):\n    with open(path) as file:\n", return_tensors="pt"))
    keys = ("input_ids", "attention_mask")
    return Case("demo", demo.base, build, {key: batch[key] for key in keys}, {key: row[key] for key in keys})


def _write(folder: Path, base: Any, seed: int, **settings: Any) -> str:
    """An expert with random, non-zero A and B, as PEFT writes it; `base` is used up."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **settings))
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # PEFT starts it as the norm, so that it does nothing
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@torch.no_grad()
def fill_router(model: Any) -> None:
    """Random weights, not drawn by the code under test, with which tokens differ in their scalings."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(ROUTER):
            width = parameter.shape[-1] if parameter.dim() > 1 else 25
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator) / width**0.5)
