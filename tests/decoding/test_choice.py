"""What `lockstep=` may be, and what is said where it cannot be done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from loramix.errors import ConfigurationError
from support.generation import generated, report_of
from support.tiny import tokens


@pytest.mark.parametrize("lockstep", [0, False])
def test_no_drafts_are_two_passes(lockstep: Any, of_llama: Any) -> None:
    generated(of_llama, input_ids=tokens(1), max_new_tokens=4, lockstep=lockstep)
    assert report_of(of_llama).reason == "sequential decoding was requested"


@pytest.mark.parametrize("lockstep", [-1, "always", 2.5])
def test_what_lockstep_cannot_be_is_refused(lockstep: Any, of_llama: Any) -> None:
    if isinstance(lockstep, int):  # the tests check types before the package does
        with pytest.raises(ConfigurationError, match="number of drafts"):
            generated(of_llama, input_ids=tokens(1), max_new_tokens=2, lockstep=lockstep)
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    settings.lockstep = lockstep
    with pytest.raises(ConfigurationError, match="number of drafts"):
        of_llama.generate(tokens(1), generation_config=settings)


def test_the_configuration_may_choose_lockstep(of_llama: Any) -> None:
    plain = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    drafting = copy.deepcopy(plain)
    drafting.lockstep = True
    expected = of_llama.generate(tokens(), generation_config=plain, lockstep=False)
    assert torch.equal(of_llama.generate(tokens(), generation_config=drafting), expected)
    assert report_of(of_llama).forwards < 2 * report_of(of_llama).tokens + 8
    assert report_of(of_llama).drafts
    of_llama.generate(tokens(), generation_config=drafting, lockstep=False)
    assert report_of(of_llama).reason == "sequential decoding was requested"


FALLBACKS: dict[str, dict[str, Any]] = {
    "only greedy decoding and sampling": {"num_beams": 2},
    "there is no cache": {"use_cache": False},
    "the cache is static": {"cache_implementation": "static"},
    "hidden states are requested": {"output_hidden_states": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_cannot_run_in_lockstep_runs_without_and_says_so_once(
    reason: str, of_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramix.model.generation._warned", set())
    with pytest.warns(UserWarning, match=reason):
        generated(of_llama, input_ids=tokens(), max_new_tokens=4, lockstep=True, **FALLBACKS[reason])
    found = generated(of_llama, input_ids=tokens(), max_new_tokens=4, lockstep=True, **FALLBACKS[reason])
    expected = generated(of_llama, input_ids=tokens(), max_new_tokens=4, lockstep=False, **FALLBACKS[reason])
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))


def test_beams_say_so_where_the_configuration_chooses_lockstep(of_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramix.model.generation._warned", set())
    settings = GenerationConfig(max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    settings.lockstep = True
    with pytest.warns(UserWarning, match="only greedy"):
        of_llama.generate(tokens(1), generation_config=settings)
    generated(of_llama, input_ids=tokens(1), max_new_tokens=1, lockstep=True)  # one token needs no second forward
    with of_llama.fixed_scalings([0.2, 0.3, 0.5]):
        generated(of_llama, input_ids=tokens(1), max_new_tokens=4, lockstep=True)
