"""Fixtures of the demo's tests: the shipped models, loaded once."""

from __future__ import annotations

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loramix.demo import base, load, tokenizer
from loramix.model.build import XLoraModel


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer()


@pytest.fixture(scope="session")
def demo_base() -> LlamaForCausalLM:
    return base().eval()


@pytest.fixture(scope="session")
def demo_mixture() -> XLoraModel:
    return load()[0]
