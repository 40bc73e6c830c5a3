"""What a mixture reads when it is looked at: the same scalings as one forward over each piece, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramix.analysis.inspection import inspect_texts
from loramix.errors import ConfigurationError, DataError, RoutingError
from loramix.evaluation.ablation import leave_one_out
from support.tiny import VOCABULARY


class _Letters:
    """A tokenizer of letters, with a start token."""

    bos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) % (VOCABULARY - 2) for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"<{number}>" for number in ids)


TEXTS = [("first", "a few letters"), ("second", "others, and more of them than in one piece"), ("none", "")]


def test_each_piece_is_routed_as_by_one_forward_over_it(routed: Any, direct: Any) -> None:
    found = inspect_texts(routed, _Letters(), TEXTS, window=16)
    record = found.record
    assert found.names == ["first", "second, tokens 0 to 14", "second, tokens 15 to 29", "second, tokens 30 to 41"]
    assert record.sequences == [0, 1, 2, 3]
    for number in record.sequences:
        text = record.sequence(number)
        assert text.tokens[0] == 1
        assert torch.allclose(text.scalings, direct(routed, text.tokens), atol=1e-6)
    assert found.notes == [
        "One text is longer than the 16 tokens that are read at once: read in pieces, each from its own beginning."
    ]


def test_the_losses_without_each_expert_are_those_of_the_same_pieces(routed: Any) -> None:
    found = inspect_texts(routed, _Letters(), TEXTS[:1], leave_out=True)
    assert found.leave_one_out is not None
    expected = leave_one_out(routed, [found.record.tokens.tolist()])
    assert found.leave_one_out.differences == pytest.approx(expected.differences, abs=1e-6)


def test_the_model_is_left_as_it_was(routed: Any) -> None:
    routed.train()
    inspect_texts(routed, _Letters(), TEXTS)
    assert routed.training
    routed.eval()


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([], {}, "at least one token"),
        ([("none", "")], {}, "nothing but empty text"),
        (TEXTS, {"limit": 1}, "a limit of 1 tokens"),
        (TEXTS, {"window": 1}, "at least two tokens"),
    ],
)
def test_what_cannot_be_read_is_told(texts: Any, options: dict[str, int], said: str, routed: Any) -> None:
    with pytest.raises(DataError) as error:
        inspect_texts(routed, _Letters(), texts, **options)
    assert said in str(error.value)


def test_arguments_that_are_no_such_thing_are_told(routed: Any) -> None:
    for texts in ((text for text in ["abc"]), (pair for pair in [("a", None)]), (pair for pair in [("a", "b", "c")])):
        with pytest.raises(DataError, match="comes with its name"):
            inspect_texts(routed, _Letters(), texts)
    for options in ({"limit": 0}, {"limit": True}, {"window": True}):
        with pytest.raises(ConfigurationError, match="must be a whole number"):
            inspect_texts(routed, _Letters(), TEXTS, **options)


def test_scalings_that_are_no_numbers_are_told(routed: Any) -> None:
    weight = next(parameter for name, parameter in routed.named_parameters() if "classifier" in name)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(RoutingError, match="finite numbers"):
        inspect_texts(routed, _Letters(), TEXTS)
    with torch.no_grad():
        weight.copy_(kept)


def test_no_routing_is_an_error(routed: Any) -> None:
    with routed.disable_adapter(), pytest.raises(RoutingError):
        inspect_texts(routed, _Letters(), TEXTS)
