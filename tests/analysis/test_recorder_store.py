"""Where recorded tokens are kept, for how long, and by whom: memory, files, threads, and what outlives what."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

import loramix
from loramix import ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.analysis import RoutingRecord, record_routing
from loramix.evaluation import leave_one_out
from loramix.passes.state import state_of
from support.mixtures import mixture
from support.recorded import Direct, assert_holds, assert_is
from support.tiny import llama, save_expert, tokens


def test_threads_do_not_mix(routed: Any, direct: Direct) -> None:
    start = threading.Barrier(4)

    def run(seed: int) -> tuple[RoutingRecord, Tensor]:
        start.wait()
        with record_routing(routed, only_this_thread=True) as own:
            out = routed.generate(tokens(2, seed=seed), max_new_tokens=8, do_sample=False)
        return own, out

    with record_routing(routed) as record, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    for own, out in found:
        assert_holds(own, routed, [row[:-1] for row in out], direct)
        for row in out:
            assert_is(record.following(row), routed, row[:-1], direct)
    assert len(record.sequences) == 8


def test_nothing_stays_behind(routed: Any) -> None:
    before = state_of(routed).hooks
    cache = DynamicCache()
    record = None
    try:
        with record_routing(routed) as record:
            routed(tokens(1), past_key_values=cache)
            assert len(cache.followers) == 1  # pyright: ignore
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert record is not None
    assert state_of(routed).hooks == before == ()
    assert cache.followers == ()
    routed(tokens(1), past_key_values=cache)
    assert record.seen == 9
    assert not record.scalings.requires_grad
    assert record.scalings.device.type == "cpu"
    gone = weakref.ref(record)
    del record
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_a_record_can_be_read_while_it_grows(routed: Any) -> None:
    with record_routing(routed) as record:
        assert "Nothing was recorded" in record.note
        routed(tokens(1))
        assert (record.seen, record.kept, len(record)) == (9, 9, 9)
        routed(tokens(2))
        assert len(record.scalings) == 27


@torch.no_grad()
def test_memory_is_bounded_and_the_sample_is_told(routed: Any, direct: Direct) -> None:
    text = tokens(1, 40)[0]
    sample = "16 tokens.*a uniform sample of the 80 tokens"
    with pytest.warns(UserWarning, match=sample), record_routing(routed, max_tokens=16, seed=1) as record:  # noqa: PT031
        routed(text[None], use_cache=False)
        routed(text[None], use_cache=False)
    assert (record.seen, record.kept, record.is_sample) == (80, 16, True)
    expected = direct(routed, text)
    assert_close(record.scalings, expected[record.positions], atol=1e-5, rtol=1e-4)
    assert record.tokens.tolist() == text[record.positions].tolist()
    with pytest.raises(RoutingError, match="in a sample"):
        record.following(text)


def test_each_token_has_the_same_chance_to_be_kept() -> None:
    from loramix.analysis.record.part import Part
    from loramix.analysis.record.stores import Reservoir

    counts = torch.zeros(60)
    for seed in range(100):
        store = Reservoir(12, seed)
        for first in range(0, 60, 5):
            number = torch.arange(first, first + 5)
            store.add(Part(number * 0, number, number, torch.zeros(5, 1, 2)))
        (part,) = store.parts()
        assert len(part) == 12
        counts[part.token] += 1
    assert counts.sum() == 100 * 12
    assert (counts - 20).abs().max() < 5 * (100 * 0.2 * 0.8) ** 0.5


@torch.no_grad()
def test_a_record_spilled_to_disk_is_the_same_record(routed: Any, direct: Direct, tmp_path: Any) -> None:
    with record_routing(routed, spill=tmp_path / "record", max_tokens=7) as record:
        out = routed.generate(tokens(2), max_new_tokens=8, do_sample=False)
        assert record.following(out[1]).tokens.tolist() == out[1, :-1].tolist()  # while it grows
    assert len(list((tmp_path / "record").glob("tokens-*.safetensors"))) == 5
    assert not record.is_sample
    for one in (record, RoutingRecord.load(tmp_path / "record")):
        assert_holds(one, routed, [row[:-1] for row in out], direct)
    with pytest.raises(ConfigurationError, match="new or empty folder"), record_routing(routed, spill=tmp_path):
        pass
    assert state_of(routed).hooks == ()


@pytest.mark.parametrize("spilled", [False, True])
def test_parts_are_those_of_their_moment_and_nobody_waits_for_their_reader(
    routed: Any, tmp_path: Path, spilled: bool
) -> None:
    with record_routing(routed, max_tokens=10, spill=tmp_path / "record" if spilled else None) as record:
        routed(tokens(1, 8, seed=1))
        before, parts = record.scalings, record.parts()
        other = threading.Thread(target=lambda: routed(tokens(1, 2 if not spilled else 9, seed=2)))
        other.start()
        other.join(60)
        assert not other.is_alive()
        assert_close(torch.cat([part.scalings for part in parts]), before)
        assert record.kept == (10 if not spilled else 17)


def test_a_record_outlives_its_model_and_does_not_keep_it(experts: Any) -> None:
    model = mixture(experts("llama"))
    with record_routing(model) as record:
        model.generate(tokens(1), max_new_tokens=3, do_sample=False)
    gone = weakref.ref(model.internal_xlora_classifier)
    del model
    gc.collect()
    assert gone() is None
    assert record.kept == 11


@torch.no_grad()
def test_copies_of_a_cache_keep_no_record_alive(routed: Any) -> None:
    with record_routing(routed) as record:
        cache = routed(tokens(1), use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
    gone = weakref.ref(record)
    del record
    gc.collect()
    assert gone() is None
    twin.crop(-2)
    twin.batch_repeat_interleave(2)
    assert routed(tokens(2, 3), past_key_values=twin).logits.shape[:2] == (2, 3)


def test_an_experiment_is_not_recorded(routed: Any, direct: Direct) -> None:
    text = tokens(1)[0]
    with record_routing(routed) as record:
        found = leave_one_out(routed, [text.tolist()])
    assert len(found.without) == 3
    assert_holds(record, routed, [text], direct)


@torch.no_grad()
def test_a_model_that_is_copied_or_moved_within_a_record(routed: Any, direct: Direct) -> None:
    with record_routing(routed) as record:
        twin = copy.deepcopy(routed)
        twin(tokens(1, seed=3))
        routed.to("cpu")
        routed(tokens(1))
    assert state_of(twin).hooks == ()
    assert_holds(record, routed, [tokens(1)[0]], direct)


def test_models_that_make_no_scalings_say_so(routed: Any, tmp_path: Any) -> None:
    base = llama()
    plain = loramix.get_peft_model(base, loramix.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model in (plain, torch.nn.Linear(2, 2), torch.nn.Sequential(routed)):
        with pytest.raises(UnsupportedOperationError, match="Only a mixture makes scalings"), record_routing(model):
            pass
    with pytest.raises(RoutingError, match="routing is fixed"), routed.disable_adapter(), record_routing(routed):
        pass
    with pytest.raises(RoutingError, match="unfix_routing"), routed.fixed_scalings([1.0, 0, 0]), record_routing(routed):
        pass
    assert state_of(routed).hooks == ()
    with record_routing(routed) as record, routed.disable_adapter():
        routed(tokens(1))
    assert "Nothing was recorded" in repr(record)
    assert record.to_pandas().empty
    with pytest.raises(RoutingError, match="recorded tokens"):
        record.metrics()
    for options in ({"max_tokens": 0}, {"max_tokens": True}, {"seed": -1}, {"seed": 2**70}):
        with pytest.raises(ConfigurationError, match="must be a whole number"), record_routing(routed, **options):
            pass
    with pytest.raises(UnsupportedOperationError, match="a NoneType without a router"), record_routing(None):
        pass


@torch.no_grad()
def test_one_expert_and_sixty_four(tmp_path: Any, direct: Direct) -> None:
    base = llama()
    names = [f"expert {i}" for i in range(64)]
    one = {
        name: save_expert(tmp_path / name, base, seed=i, r=1, target_modules=["q_proj"]) for i, name in enumerate(names)
    }
    for some in (names[:1], names):
        model = mixture({name: one[name] for name in some}, layerwise_scalings=True)
        with record_routing(model) as record:
            model(tokens(1))
        assert_holds(record, model, [tokens(1)[0]], direct)
        assert record.experts == some
        assert record.metrics().tokens == 9
