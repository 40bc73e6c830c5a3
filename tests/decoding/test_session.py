"""A session lives beside everything else: other calls, other threads, changed settings, an interruption."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from loramix.errors import CacheError
from support.generation import generated, report_of
from support.tiny import tokens


@pytest.mark.parametrize("lockstep", [True, 5])
def test_what_is_switched_meanwhile_is_refused_as_between_two_passes(lockstep: Any, of_llama: Any) -> None:
    def switch(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 12:
            of_llama.disable_adapter_layers()
        return scores

    for setting in (False, lockstep):
        with pytest.raises(CacheError, match="continued the way it was filled"):
            generated(of_llama, input_ids=tokens(1), max_new_tokens=12, logits_processor=[switch], lockstep=setting)
        of_llama.enable_adapter_layers()


def test_the_cache_is_continued_either_way(drafts: Any) -> None:
    whole = generated(drafts, input_ids=tokens(2), max_new_tokens=16, lockstep=False)
    for first, second in ((True, False), (False, True), (True, True), (4, 4)):
        part = generated(drafts, input_ids=tokens(2), max_new_tokens=8, lockstep=first, return_dict_in_generate=True)
        rest = generated(
            drafts,
            input_ids=part.sequences,
            attention_mask=torch.ones_like(part.sequences),  # the padding's token is among what was generated
            past_key_values=part.past_key_values,
            max_new_tokens=8,
            lockstep=second,
        )
        assert torch.equal(rest, whole)


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a forward": lambda model, ids: model(input_ids=ids),
    "embeddings": lambda model, ids: model(inputs_embeds=model.get_input_embeddings()(ids)),
    "one token": lambda model, ids: model(input_ids=ids[:, -1:], position_ids=torch.zeros(len(ids), 1).long()),
    "beams": lambda model, ids: model.generate(ids, num_beams=3, max_new_tokens=4, do_sample=False),
    "another generation": lambda model, ids: model.generate(ids, max_new_tokens=4, do_sample=False, lockstep=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lockstep", [True, 4])
@pytest.mark.parametrize("weight", [0.02, 1.0])
def test_whoever_calls_the_model_meanwhile_is_answered_as_ever(
    call: str, weight: float, lockstep: Any, of_llama: Any
) -> None:
    answers: list[Any] = []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        answers.append(CALLS[call](of_llama, ids))
        return scores

    of_llama.set_global_scaling_weight(weight)
    inputs = {"input_ids": tokens(2), "max_new_tokens": 7, "logits_processor": [processor]}
    expected = generated(of_llama, lockstep=False, **inputs)
    right, answers = answers, []
    assert torch.equal(generated(of_llama, lockstep=lockstep, **inputs), expected)
    assert report_of(of_llama).tokens == 6
    of_llama.set_global_scaling_weight(1.0)
    for one, other in zip(answers, right, strict=True):
        assert_close(getattr(one, "logits", one), getattr(other, "logits", other), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("lockstep", [True, 5])
def test_a_setting_that_changes_meanwhile_counts_from_the_next_token(lockstep: Any, of_llama: Any) -> None:
    def run(setting: Any) -> Any:
        class Change(BaseStreamer):
            count = 0

            def put(self, value: Tensor) -> None:
                self.count += 1
                if self.count == 6:
                    of_llama.set_scaling_pass_value(0.9)

            def end(self) -> None:
                of_llama.set_scaling_pass_value(0.2)

        asked = {"return_dict_in_generate": True, "output_logits": True}
        return generated(of_llama, input_ids=tokens(1), max_new_tokens=12, streamer=Change(), lockstep=setting, **asked)

    of_llama.set_global_scaling_weight(0.02)
    found, expected = run(lockstep), run(False)
    of_llama.set_global_scaling_weight(1.0)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_keys_and_values_are_held_once(of_llama: Any) -> None:
    """The passes' own caches are views of the store while it stands in for them."""
    shared: list[bool] = []

    class Look(BaseStreamer):
        def put(self, value: Tensor) -> None:
            layer = cache.layers[0]
            if hasattr(cache, "base") and cache.torn:
                shared.append(
                    layer.keys.untyped_storage().data_ptr() == cache.base.layers[0].keys.untyped_storage().data_ptr()
                )

        def end(self) -> None: ...

    cache: Any = DynamicCache(config=of_llama.config)
    generated(of_llama, input_ids=tokens(1), past_key_values=cache, max_new_tokens=6, lockstep=True, streamer=Look())
    assert shared
    assert all(shared)


@pytest.mark.parametrize("lockstep", [True, 4])
def test_threads_decode_on_their_own(lockstep: Any, of_llama: Any) -> None:
    expected = [generated(of_llama, input_ids=tokens(1, seed=i), max_new_tokens=10, lockstep=False) for i in range(3)]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        ids = tokens(1, seed=number)
        found[number] = of_llama.generate(ids, max_new_tokens=10, do_sample=False, lockstep=lockstep)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(3))


def test_an_interruption_leaves_the_cache_whole(of_llama: Any) -> None:
    class Enough(Exception):
        pass

    class Stop(BaseStreamer):
        count = 0

        def put(self, value: Tensor) -> None:
            self.count += 1
            if self.count == 7:
                raise Enough

        def end(self) -> None: ...

    first = of_llama(tokens(1)[:, :-1], use_cache=True)
    cache = first.past_key_values
    with pytest.raises(Enough):
        generated(
            of_llama, input_ids=tokens(1), past_key_values=cache, max_new_tokens=20, lockstep=True, streamer=Stop()
        )
    assert cache.get_seq_length() == cache.base.get_seq_length() > 8
    part = generated(of_llama, input_ids=tokens(1), max_new_tokens=cache.get_seq_length() - 8, lockstep=False)
    rest = generated(of_llama, input_ids=part, past_key_values=copy.deepcopy(cache), max_new_tokens=4, lockstep=False)
    assert torch.equal(rest, generated(of_llama, input_ids=part, max_new_tokens=4, lockstep=False))
    cache.reset()
    expected = generated(of_llama, input_ids=tokens(1), max_new_tokens=4, lockstep=False)
    assert torch.equal(generated(of_llama, input_ids=tokens(1), max_new_tokens=4, past_key_values=cache), expected)
