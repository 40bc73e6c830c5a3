"""Base models that keep state outside the cache: where two passes would share it, there is no cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import DynamicCache

import loramix
from loramix import CacheError, ModelError
from loramix._compat import CACHE
from loramix.experts.dry_run import dry_run
from loramix.experts.kept_state import KeptState
from support.generation import generated, ids_with_padding, recomputed, report_of
from support.mixtures import mixture
from support.refusals import refused
from support.tiny import ARCHITECTURES, BLOCKS, GATED, HIDDEN, SPECIAL, build, llama, save_expert, tokens
from support.versions import needs_transformers

LlamaMLP = hf.models.llama.modeling_llama.LlamaMLP


class TokenShift(LlamaMLP):
    """Adds the token before, which it remembers."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        goes_on = x.shape[1] == 1 and self.recall() is not None
        before = self.recall() if goes_on else F.pad(x, (0, 0, 1, -1))
        self.remember(x[:, -1:])
        assert before is not None
        return super().forward(x + before)

    def recall(self) -> Tensor | None:
        return self.last

    def remember(self, last: Tensor) -> None:
        self.last = last


class InAList(TokenShift):
    def recall(self) -> Tensor | None:
        return self.__dict__.setdefault("memory", [None])[0]

    def remember(self, last: Tensor) -> None:
        self.__dict__["memory"] = [last]


class OfAllModels(TokenShift):
    memory: ClassVar[dict[str, Tensor]] = {}

    def recall(self) -> Tensor | None:
        return self.memory.get("last")

    def remember(self, last: Tensor) -> None:
        self.memory["last"] = last


class Drifting(LlamaMLP):
    """Depends on the text before, with a cache or without."""

    mean: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + self.mean)
        self.mean = x.mean()
        return y


class Recording(LlamaMLP):
    """Remembers, and never looks at it; scales by numbers that it computes once."""

    scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        if self.scale is None:
            self.scale = torch.ones(x.shape[-1])
        return super().forward(x * self.scale)


def with_mlp(kind: type[nn.Module]) -> Any:
    base: Any = llama()
    base.model.layers[1].mlp.__class__ = kind
    return base


def rwkv(**changes: Any) -> Any:
    sizes = {"attention_hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "context_length": 128}
    return build(hf.RwkvForCausalLM, **{**SPECIAL, "hidden_size": HIDDEN, **sizes, **changes})


def recurrent_gemma() -> Any:
    sizes = {"num_hidden_layers": 3, "head_dim": 16, "lru_width": HIDDEN, "attention_window_size": 32}
    return build(hf.RecurrentGemmaForCausalLM, **{**GATED, "num_key_value_heads": 1, **sizes})


def mamba() -> Any:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8}
    return build(hf.MambaForCausalLM, **{**SPECIAL, **sizes})


def reformer() -> Any:
    sizes = {"attn_layers": ["local", "local"], "local_attn_chunk_length": 4, "attention_head_size": 16}
    sizes |= {"is_decoder": True, "axial_pos_embds": False, "feed_forward_size": 96}
    return build(hf.ReformerModelWithLMHead, **{**BLOCKS, **sizes})


IN_MODULES = KeptState(in_modules=True)
STATEFUL: dict[str, tuple[Callable[[], Any], KeptState, list[str]]] = {
    "rwkv": (rwkv, KeptState(("state",)), ["attention.key", "attention.value"]),
    "recurrent_gemma": (recurrent_gemma, IN_MODULES, ["q_proj", "v_proj", "linear_x", "down_proj"]),
    "token shift": (lambda: with_mlp(TokenShift), IN_MODULES, ["q_proj", "down_proj"]),
    "in a list": (lambda: with_mlp(InAList), IN_MODULES, ["q_proj", "down_proj"]),
    "of all models": (lambda: with_mlp(OfAllModels), IN_MODULES, ["q_proj", "down_proj"]),
}


@pytest.fixture(autouse=True)
def forget() -> None:
    OfAllModels.memory.clear()


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the warning, which comes once, had been given."""
    monkeypatch.setattr("loramix.model.generation._warn_once", lambda *_: None)


@pytest.fixture(params=STATEFUL)
def stateful(request: pytest.FixtureRequest) -> str:
    return request.param


def mixed(folder: Path, name: str, **config: Any) -> Any:
    make, _, targets = STATEFUL[name]
    experts = {
        expert: save_expert(folder / expert, make(), seed=seed, target_modules=targets)
        for seed, expert in enumerate(("math", "code"))
    }
    return mixture(experts, base=make(), layerwise_scalings=True, **config)


def test_it_is_found(stateful: str) -> None:
    make, kept, _ = STATEFUL[stateful]
    found = dry_run(make().base_model)
    assert found is not None
    assert found.kept == kept


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_holds_all_that_usual_models_keep(architecture: str) -> None:
    found = dry_run(ARCHITECTURES[architecture]().base_model)
    assert found is not None
    assert found.kept == KeptState()


def test_what_is_kept_and_not_read_does_not_matter() -> None:
    found = dry_run(with_mlp(Recording).model)
    assert found is not None
    assert found.kept == KeptState()


@needs_transformers(5, 5, "the cache of Mamba is none of the class Cache")
def test_a_state_in_the_cache_is_none_outside_it() -> None:
    found = dry_run(mamba().base_model)
    assert found is not None
    assert found.kept == KeptState()


def test_a_cache_of_another_class_is_a_state() -> None:
    found = dry_run(reformer().reformer)
    assert found is not None
    assert found.kept.fields == ("past_buckets_states",)


def test_weights_that_a_forward_rescales_are_no_hindrance() -> None:
    found = dry_run(rwkv(num_hidden_layers=8, hidden_size=256, attention_hidden_size=256, intermediate_size=256).rwkv)
    assert found is not None
    assert found.kept.fields == ("state",)


@pytest.mark.usefixtures("warned")
@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": tokens(2)},
        {"input_ids": tokens(1, 3), "num_beams": 3},
        {"input_ids": tokens(2), "do_sample": True, "lockstep": True},
    ],
    ids=["greedy", "beams", "sampling"],
)
def test_generation_recomputes(stateful: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    model = mixed(tmp_path, stateful)
    assert torch.equal(generated(model, **inputs), recomputed(model, **inputs))
    assert torch.equal(generated(model, use_cache=True, **inputs), recomputed(model, **inputs))
    found = generated(model, return_dict_in_generate=True, output_logits=True, **inputs | {"num_beams": 1})
    assert found.sequences.shape[1] == inputs["input_ids"].shape[1] + len(found.logits)
    assert report_of(model).reason is not None


def test_a_warning_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramix.model.generation._warned", set())
    model = mixed(tmp_path, "token shift")
    generated(model, input_ids=tokens(), use_cache=False)
    with pytest.warns(UserWarning, match="use_cache has no effect: the base model keeps state outside the cache"):
        generated(model, input_ids=tokens())
    generated(model, input_ids=tokens())


def test_a_forward_with_a_cache_is_an_error(stateful: str, tmp_path: Path) -> None:
    model = mixed(tmp_path, stateful)
    model(tokens())
    model(tokens(), use_cache=False)
    with pytest.raises(CacheError, match=r"keeps state in (its modules|state)") as caught:
        model(tokens(), use_cache=True)
    assert "use_cache=False" in caught.value.remedy


@needs_transformers(5, 5, "the cache of Mamba is none of the class Cache")
def test_a_cache_or_a_state_that_is_given_is_an_error(tmp_path: Path) -> None:
    model = mixed(tmp_path, "recurrent_gemma")
    with pytest.raises(CacheError, match=f"{CACHE}=…"):
        model(tokens(), past_key_values=DynamicCache(config=model.config))
    model = mixed(tmp_path, "rwkv")
    assert model(tokens()).state is None
    with model.disable_adapter():
        state = model(tokens()).state
    with pytest.raises(CacheError, match=r"state=…"):
        model(tokens(2, 1), state=state)


def test_where_one_pass_runs_the_cache_is_used_as_the_base_model_does(stateful: str, tmp_path: Path) -> None:
    model = mixed(tmp_path, stateful)
    plain = STATEFUL[stateful][0]()
    with model.disable_adapter():
        assert torch.equal(generated(model, input_ids=tokens()), generated(plain, input_ids=tokens()))
        assert model(tokens(), use_cache=True).logits.shape == (2, 9, 96)
    experts = {name: str(tmp_path / name) for name in ("math", "code")}
    static: Any = loramix.get_peft_model(plain, loramix.XLoraConfig(adapters=experts, router="static")).eval()
    with model.fixed_scalings([0.5, 0.5]):
        assert torch.equal(generated(model, input_ids=tokens()), generated(static, input_ids=tokens()))


def test_a_forward_that_depends_on_the_one_before_is_refused(tmp_path: Path) -> None:
    folder = save_expert(tmp_path / "one", llama(), target_modules=["q_proj"])
    base = with_mlp(Drifting)
    config = loramix.XLoraConfig(hidden_size=HIDDEN, adapters={"one": folder})
    told = refused(ModelError, base, tmp_path, lambda: loramix.get_peft_model(base, config))
    assert "depends on the text read before" in told.received


def test_left_padding_is_recomputed_too(tmp_path: Path, warned: None) -> None:
    model = mixed(tmp_path, "token shift")
    mask = (ids_with_padding() != 0).long()
    inputs = {"input_ids": ids_with_padding(), "attention_mask": mask}
    assert torch.equal(generated(model, **inputs), recomputed(model, **inputs))
