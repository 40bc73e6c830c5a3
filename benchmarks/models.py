"""The contenders: one base model three times, plain, with loramix's mixture and with PEFT's, of the same files."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.limit import Weights, weights_of
from benchmarks.sizes import Size
from loramix import LoraConfig, XLoraConfig, get_peft_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Models:
    """The three models, and a prompt.

    Args:
        size: of all three.
        base: the plain model.
        loramix: the mixture.
        peft: PEFT's mixture of the same experts with the same router.
        prompt: (1, size.prompt) token ids.
        weights: what each part multiplies.
        difference: the largest difference between the mixtures' logits, relative to the largest logit.
    """

    size: Size
    base: Any
    loramix: Any
    peft: Any
    prompt: Tensor
    weights: Weights
    difference: float


def build(size: Size, folder: Path) -> Models:
    """Write random experts to `folder` and build the three models; both mixtures must compute the same.

    Raises:
        RuntimeError: they do not.
    """
    router: dict[str, Any] = {
        "hidden_size": size.hidden,
        "adapters": save_experts(folder, size),
        "xlora_depth": size.depth,
        "xlora_size": size.router_width,
        "layerwise_scalings": size.layerwise,
        "task_type": "CAUSAL_LM",
    }
    ours: Any = get_peft_model(llama(size), XLoraConfig(**router)).eval()
    theirs = _peft(size, router)
    theirs.base_model.internal_xlora_classifier.load_state_dict(ours.internal_xlora_classifier.state_dict())
    prompt = torch.randint(size.vocabulary, (1, size.prompt), generator=torch.Generator().manual_seed(0))
    weights = weights_of(ours, ours.get_output_embeddings())
    return Models(size, llama(size), ours, theirs, prompt, weights, _difference(ours, theirs, prompt))


def llama(size: Size, **settings: Any) -> LlamaForCausalLM:
    """The base model, with random weights that are the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def _peft(size: Size, router: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers renames
        return peft.get_peft_model(llama(size, use_cache=False), peft.XLoraConfig(**router)).eval()  # as PEFT wants it


def save_experts(folder: Path, size: Size) -> dict[str, str]:
    """Write random experts; names, which are numbers as PEFT wants them, to folders."""
    base = llama(size)
    return {str(i): _save_expert(folder / str(i), base, size.rank, seed=i) for i in range(size.experts)}


def _save_expert(folder: Path, base: Any, rank: int, seed: int) -> str:
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=LINEARS,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    model.unload()
    return str(folder)


@torch.no_grad()
def _difference(ours: Any, theirs: Any, prompt: Tensor) -> float:
    expected = theirs(input_ids=prompt).logits
    found = ours(input_ids=prompt).logits
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the two mixtures compute different logits: {difference:.2e} relative")
    return difference
