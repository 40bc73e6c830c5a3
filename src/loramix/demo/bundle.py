"""What ships inside the package: a small base model, its tokenizer, one expert a domain, and a trained router.

data/base/            the base model (bfloat16) and its tokenizer
data/mixture/         the mixture: its router, and in <domain>/ the experts in PEFT's LoRA format
data/train.log        how they were made, by `python -m loramix.demo.train`
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loramix.demo.corpus import DOMAINS
from loramix.errors import CheckpointNotFoundError
from loramix.model import PeftModel, XLoraModel

DATA = Path(__file__).parent / "data"


def base(data: Path = DATA) -> LlamaForCausalLM:
    """The base model, new at each call, in float32: bfloat16 is only how it is stored."""
    return LlamaForCausalLM.from_pretrained(_present(data / "base"), dtype=torch.float32)


def tokenizer(data: Path = DATA) -> PreTrainedTokenizerFast:
    """The base model's tokenizer: byte-level BPE of 2048 tokens, digits one by one."""
    return PreTrainedTokenizerFast.from_pretrained(_present(data / "base"))


def experts(data: Path = DATA) -> dict[str, str]:
    """Name and folder of each LoRA expert, as `XLoraConfig(adapters=…)` takes them."""
    return {domain: str(_present(data / "mixture" / domain)) for domain in DOMAINS}


def load(data: Path = DATA) -> tuple[XLoraModel, PreTrainedTokenizerFast]:
    """The shipped mixture with its trained router, ready to generate, and its tokenizer."""
    model = PeftModel.from_pretrained(base(data), _present(data / "mixture"))
    assert isinstance(model, XLoraModel)
    return model, tokenizer(data)


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            "The demo's models ship inside the package.",
            received=f"no folder {folder}",
            remedy="install loramix from its wheel or its source tree, not from a zip file of modules",
        )
    return folder
