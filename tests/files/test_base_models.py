"""Base models without their weights."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from loramix.errors import ModelError
from loramix.files.base_models import without_weights
from support.tiny import BLOCKS


def test_the_class_is_the_one_that_the_configuration_names() -> None:
    config: Any = hf.LlamaConfig(**BLOCKS, architectures=["LlamaForSequenceClassification"])
    model = without_weights(config)
    assert type(model) is hf.LlamaForSequenceClassification
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(without_weights(config, causal=True)) is hf.LlamaForCausalLM


def test_a_configuration_without_such_a_model_is_named() -> None:
    config: Any = hf.T5Config(name_or_path="folder")
    assert type(without_weights(config)) is hf.T5Model
    with pytest.raises(ModelError, match="causal language") as caught:
        without_weights(config, causal=True)
    assert "'folder', of type 't5'" in caught.value.received
