"""A tiny base model with a tokenizer, two experts and a mixture, as folders; and the command line as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from loramix import XLoraConfig, get_peft_model
from loramix.cli import main
from support import tiny
from support.byte_tokenizer import byte_tokenizer
from support.commands import Folders, Outcome
from support.training_files import Files, write_training_files

EXPERTS = {"math": ["q_proj", "v_proj"], "code": ["q_proj", "down_proj"]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("cli")
    byte_tokenizer().save_pretrained(root / "base")
    tiny.llama(vocab_size=257, bos_token_id=0, pad_token_id=0).save_pretrained(root / "base")
    base = LlamaForCausalLM.from_pretrained(root / "base")
    experts = {
        name: tiny.save_expert(root / name, base, seed=rank, r=rank, target_modules=targets)
        for rank, (name, targets) in enumerate(EXPERTS.items(), 2)
    }
    torch.manual_seed(0)
    config = XLoraConfig(hidden_size=tiny.HIDDEN, adapters=experts, layerwise_scalings=True, xlora_depth=1)
    get_peft_model(base, config).save_pretrained(root / "mixture")
    return Folders(root / "base", root / "mixture", {name: Path(path) for name, path in experts.items()})


@pytest.fixture
def loramix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`loramix("info", "path")`: the command in this process, in a terminal 100 columns wide and without colour."""
    for name, value in {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)

    def run(*words: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return Outcome(int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_training_files(tmp_path_factory.mktemp("training"))
