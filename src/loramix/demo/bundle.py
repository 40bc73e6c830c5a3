"""The models inside the package: a small base model, its tokenizer, one expert for each domain, and a trained router.

data/base/            the base model (bfloat16) and its tokenizer
data/mixture/         the mixture: its router, and in <domain>/ the experts in PEFT's LoRA format
data/train.log        the log of their training, by `python -m tools.train_demo` in the source tree
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loramix.demo.corpus import DOMAINS
from loramix.errors import CheckpointNotFoundError
from loramix.model.build import PeftModel, XLoraModel

DATA = Path(__file__).parent / "data"


def base(data: Path = DATA) -> LlamaForCausalLM:
    """The base model, a new one at each call, in float32; it is stored in bfloat16."""
    return LlamaForCausalLM.from_pretrained(_folder(data, "base", "model.safetensors"), dtype=torch.float32)


def tokenizer(data: Path = DATA) -> PreTrainedTokenizerFast:
    """The base model's tokenizer: byte-level BPE of 2048 tokens, digits one by one."""
    return PreTrainedTokenizerFast.from_pretrained(_folder(data, "base", "tokenizer.json"))


def mixture(data: Path = DATA) -> Path:
    """The folder of the shipped mixture."""
    return _folder(data, "mixture", "adapter_model.safetensors")


def experts(data: Path = DATA) -> dict[str, str]:
    """The name and the folder of each LoRA expert, for `XLoraConfig(adapters=…)`."""
    return {name: str(_folder(data, f"mixture/{name}", "adapter_model.safetensors")) for name in DOMAINS}


def load(data: Path = DATA) -> tuple[XLoraModel, PreTrainedTokenizerFast]:
    """The shipped mixture with its trained router, ready to generate, and its tokenizer."""
    model = PeftModel.from_pretrained(base(data), mixture(data))
    assert isinstance(model, XLoraModel)
    return model, tokenizer(data)


def _folder(data: Path, name: str, needed: str) -> Path:
    if not (data / name / needed).is_file():
        raise CheckpointNotFoundError(
            "The demo's models ship inside the package.",
            received=f"no {name}/{needed} in {data}",
            remedy="install loramix from its wheel or its source tree, not from a zip file of modules",
        )
    return data / name
