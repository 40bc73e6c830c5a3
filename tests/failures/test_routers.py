"""A router that is not the mixture's, and text that makes none: an error of ours that says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramix import DataError, LoramixError, PeftModel, XLoraConfig, get_peft_model
from loramix.errors import AdapterMismatchError, CheckpointError
from loramix.routers import router_kinds
from loramix.training import init_router
from support.tiny import llama, tokens

Experts = Callable[[str], dict[str, str]]
KINDS = [kind.kind for kind in router_kinds() if not kind.kind.startswith("test-")]
every_kind = pytest.mark.parametrize("kind", KINDS)


def mixture(experts: Experts, kind: str, count: int = 3) -> Any:
    folders = dict(list(experts("llama").items())[:count])
    return get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=folders, router=kind)).eval()


def refused(call: Callable[[], object], *said: str) -> LoramixError:
    with pytest.raises((AdapterMismatchError, CheckpointError)) as caught:
        call()
    for words in said:
        assert re.search(words, str(caught.value)), caught.value
    assert caught.value.received
    assert caught.value.remedy
    return caught.value


@every_kind
@pytest.mark.parametrize("other", KINDS)
def test_a_router_of_another_kind(kind: str, other: str, experts: Experts, tmp_path: Path) -> None:
    """The configuration names one kind, the file holds another."""
    if kind == other:
        return
    mixture(experts, kind).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"router": other}
    config["peft_type"] = "XLORA" if other == "classifier" else "LORAMIX"
    path.write_text(json.dumps(config))
    base = llama()
    refused(lambda: PeftModel.from_pretrained(base, tmp_path))
    assert not isinstance(base, PeftModel)


@every_kind
def test_a_router_of_another_number_of_experts(kind: str, experts: Experts, tmp_path: Path) -> None:
    mixture(experts, kind).save_pretrained(tmp_path / "three")
    mixture(experts, kind, 2).save_pretrained(tmp_path / "two")
    file = tmp_path / "three" / "adapter_model.safetensors"
    save_file(load_file(tmp_path / "two" / file.name), file)
    base = llama()
    refused(lambda: PeftModel.from_pretrained(base, tmp_path / "three"), "expected|experts")
    assert not isinstance(base, PeftModel)


@every_kind
def test_a_router_of_another_width(kind: str, experts: Experts, tmp_path: Path) -> None:
    """Of another hidden size, or of layers with other ranks."""
    mixture(experts, kind).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: torch.cat([tensor, tensor], dim=-1) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    base = llama()
    refused(lambda: PeftModel.from_pretrained(base, tmp_path), "expected|experts")
    assert not isinstance(base, PeftModel)


@pytest.mark.parametrize("kind", ["classifier", "prototypes", "static", "linear"])
def test_labels_of_one_expert_alone(kind: str, experts: Experts) -> None:
    model = mixture(experts, kind)
    before = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    with pytest.raises(DataError, match=r"no token for 'code', 'prose'[\s\S]*remedy: Give a few texts for each"):
        init_router(model, "labels", batches=[{"input_ids": tokens(), "expert_ids": torch.tensor([0, 0])}])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.router.state_dict().items())
