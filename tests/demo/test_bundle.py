"""What ships: small, complete, and worth its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loramix.demo import DOMAINS, bundle
from loramix.demo.compare import compare, heldout_columns
from loramix.errors import CheckpointNotFoundError
from loramix.evaluation.scores import BASE, UNIFORM
from loramix.model.build import XLoraModel

MEBIBYTE = 2**20


def test_it_is_small() -> None:
    sizes = {path: path.stat().st_size for path in bundle.DATA.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 10 * MEBIBYTE


def test_nothing_is_in_it_twice() -> None:
    contents = [path.read_bytes() for path in bundle.DATA.rglob("*.safetensors")]
    assert len(contents) == len(DOMAINS) + 2
    assert len(set(contents)) == len(contents)


def test_the_log_of_its_making_lies_beside_it() -> None:
    log = (bundle.DATA / "train.log").read_text(encoding="utf-8")
    assert all(f"== {stage}" in log for stage in ("tokenizer", "base", "experts", "router"))
    assert "/" not in log.replace("tokens/s", "")


def test_every_expert_differs_from_the_base(demo_mixture: XLoraModel, demo_base: LlamaForCausalLM) -> None:
    ids = torch.arange(1, 40).unsqueeze(0)
    experts = demo_mixture.expert_names
    with torch.no_grad():
        plain = demo_base(input_ids=ids).logits
        with demo_mixture.disable_adapter():
            torch.testing.assert_close(demo_mixture(input_ids=ids).logits, plain)
        for number in range(len(experts)):
            with demo_mixture.fixed_scalings([float(i == number) for i in range(len(experts))]):
                assert (demo_mixture(input_ids=ids).logits - plain).abs().max() > 1.0


def test_the_shipped_router_earns_its_place(demo_mixture: XLoraModel, demo_tokenizer: PreTrainedTokenizerFast) -> None:
    result = compare(demo_mixture, heldout_columns(demo_tokenizer, 4))
    assert list(result.bits_per_byte)[1:-3] == list(DOMAINS)
    assert result.rivals == [*DOMAINS, UNIFORM]
    assert result.router_earns_its_place
    assert result.best_expert == {domain: domain for domain in DOMAINS}
    for domain in DOMAINS:
        assert result.bits_per_byte[domain][domain] < result.bits_per_byte[BASE][domain]


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="inside the package"):
        bundle.base(tmp_path)
