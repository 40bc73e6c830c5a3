"""Weights that a prompt chooses on the shipped mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramix.demo import corpus
from loramix.demo.files import PROMPTS
from loramix.demo.text import windows
from loramix.model.prompt_choice import Similarity


@pytest.fixture(scope="module")
def similarity(demo_mixture: Any, demo_tokenizer: Any) -> Similarity:
    examples = {name: demo_tokenizer(texts, return_tensors="pt") for name, texts in PROMPTS.items()}
    return Similarity.to(demo_mixture, examples)


@pytest.mark.parametrize("name", PROMPTS)
def test_an_example_of_an_expert_chooses_it(
    name: str, similarity: Similarity, demo_mixture: Any, demo_tokenizer: Any
) -> None:
    (weights,) = similarity(demo_mixture, demo_tokenizer(PROMPTS[name], return_tensors="pt"))
    assert demo_mixture.expert_names[int(weights.argmax())] == name
    assert weights.max() > 0.9


def test_text_of_a_domain_chooses_its_expert(similarity: Similarity, demo_mixture: Any, demo_tokenizer: Any) -> None:
    found = list[bool]()
    for number, domain in enumerate(demo_mixture.expert_names):
        rows = windows(demo_tokenizer, corpus.train_text(domain, 20_000), count=4, per_text=1)
        weights = similarity(demo_mixture, {"input_ids": torch.tensor([row[:64] for row in rows])})
        found += (weights.argmax(-1) == number).tolist()
    assert sum(found) >= 0.75 * len(found)
