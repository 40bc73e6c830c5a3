"""Mixture-of-experts base models: PEFT's `target_parameters` is the oracle, and a block merged for each token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix import errors, formats
from loramix._compat import enable_checkpointing
from loramix.errors import UnsupportedAdapterError
from loramix.model.compatibility import check_base
from support.disk import edited
from support.mixtures import far, logits_of, mixture
from support.peft_side import PEFT_WARNINGS, read_by_peft
from support.refusals import refused
from support.routers import EnergyRouter
from support.tiny import MOES, qwen3_moe, tokens

pytestmark = pytest.mark.filterwarnings(
    *PEFT_WARNINGS,
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",  # it looks at modules alone
)

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
GATES: dict[str, list[str]] = {
    "qwen3_moe": ["gate.weight"],
    "mixtral": ["gate.weight"],
    "gpt_oss": ["router.weight"],
    "llama4": [],
}
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def peft_model(base: Any, *, seed: int = 0, **config: Any) -> Any:
    """PEFT's model in memory, with random A and B: what PEFT reads back from its own file may be another one."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**{**settings, "target_parameters": BOTH, **config})).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    return model


def experts_of(name: str, folder: Path, count: int = 2, **config: Any) -> tuple[dict[str, str], list[Any]]:
    """Experts' folders, and PEFT's models of them."""
    models = [peft_model(MOES[name](), seed=i, r=2 + i, **config) for i in range(count)]
    folders = {f"e{i}": str(folder / f"e{i}") for i in range(count)}
    for place, model in zip(folders.values(), models, strict=True):
        model.save_pretrained(place)
    return folders, models


CASES: dict[str, dict[str, Any]] = {
    "both": {},
    "one": {"target_parameters": BOTH[:1]},
    "the other": {"target_parameters": BOTH[1:], "use_rslora": True},
    "patterns": {"rank_pattern": {r".*layers\.1\..*gate_up_proj": 5}, "alpha_pattern": {"down_proj": 3}},
    "no modules": {"target_modules": []},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MOES)
def test_one_expert_equals_pefts_in_memory(name: str, case: str, tmp_path: Path) -> None:
    folders, models = experts_of(name, tmp_path, **CASES[case])
    model = mixture(folders, base=MOES[name]())
    base = logits_of(MOES[name]())
    for i, (folder, theirs) in enumerate(zip(folders.values(), models, strict=True)):
        expected = logits_of(theirs)
        with model.fixed_scalings([float(i == e) for e in range(2)]):
            assert_close(logits_of(model), expected, **CLOSE)
        alone: Any = loramix.PeftModel.from_pretrained(MOES[name](), folder)
        assert_close(logits_of(alone), expected, **CLOSE)
        assert far(expected, base)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)


@pytest.mark.parametrize("name", [name for name in MOES if GATES[name]])
def test_what_chooses_a_blocks_experts_is_adapted(name: str, tmp_path: Path) -> None:
    folders, models = experts_of(name, tmp_path, target_parameters=[*BOTH, *GATES[name]], target_modules=[])
    model = mixture(folders, base=MOES[name]())
    assert len(model.adapted_modules) == 6
    for i, theirs in enumerate(models):
        with model.fixed_scalings([float(i == e) for e in range(2)]):
            assert_close(logits_of(model), logits_of(theirs), **CLOSE)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_all_linear_as_peft_understands_it(name: str, tmp_path: Path) -> None:
    folders, models = experts_of(name, tmp_path, target_modules="all-linear", target_parameters=None)
    model = mixture(folders, base=MOES[name]())
    assert len({path.rpartition(".")[2] for path in model.adapted_modules}) == 7
    for i, theirs in enumerate(models):
        with model.fixed_scalings([float(i == e) for e in range(2)]):
            assert_close(logits_of(model), logits_of(theirs), **CLOSE)


def deltas(model: Any, parameter: str) -> dict[str, Tensor]:
    """PEFT's update of a parameter, by the path of its block."""
    found = {
        path.removeprefix("base_model.model.").replace(".base_layer", ""): module.get_delta_weight("default")
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.ParamWrapper) and module.parameter_name == parameter
    }
    return {path: delta.detach() for path, delta in found.items()}


@pytest.mark.parametrize("name", MOES)
def test_a_block_equals_one_that_is_merged_for_each_token(name: str, tmp_path: Path) -> None:
    """Σ_e s[t, e] · ΔW_e merged into the block, which is then given the token t alone."""
    folders, models = experts_of(name, tmp_path, target_modules=[])
    model = mixture(folders, base=MOES[name](), layerwise_scalings=True)
    place = next(path for path in model.adapted_modules if path.endswith("gate_up_proj")).rpartition(".")[0]
    seen: dict[str, Any] = {}
    model.get_submodule(place).register_forward_hook(lambda _, inputs, y: seen.update(inputs=inputs, y=y))
    logits_of(model)
    s = model.get_latest_scalings().flatten(0, 1)
    assert (s[0] - s[1]).abs().max() > 0.05
    numbers = {path.rpartition(".")[2]: i for i, path in reversed(list(enumerate(model.adapted_modules)))}
    hidden, *chosen = seen["inputs"]
    count = len(model.get_submodule(place).base_layer.down_proj)
    for t in (0, 3, len(s) - 1):
        block = copy.deepcopy(MOES[name]().get_submodule(place))
        for parameter, number in numbers.items():
            for e, theirs in enumerate(models):
                getattr(block, parameter).data += s[t, number, e] * deltas(theirs, parameter)[place]
        if chosen:
            expected, found = block(hidden[t : t + 1], *(each[t : t + 1] for each in chosen)), seen["y"][t : t + 1]
        else:
            rows = torch.arange(count) * len(s) + t
            expected, found = block(hidden[rows]), seen["y"][rows]
        assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", MOES)
def test_cached_generation_equals_recomputing_and_a_saved_mixture_its_original(name: str, tmp_path: Path) -> None:
    folders, _ = experts_of(name, tmp_path / "experts")
    model = mixture(folders, base=MOES[name]())
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(tokens(), **settings)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **settings))
    if name == "mixtral":
        assert torch.equal(cached, model.generate(tokens(), lockstep=True, **settings))
    model.save_pretrained(tmp_path / "mixture")
    again: Any = loramix.PeftModel.from_pretrained(MOES[name](), tmp_path / "mixture")
    assert torch.equal(logits_of(again), logits_of(model))
    for expert, folder in folders.items():
        before, after = (
            load_file(f"{place}/adapter_model.safetensors") for place in (folder, tmp_path / f"mixture/{expert}")
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
    unloaded = model.unload()
    assert type(unloaded.get_submodule("model.layers.0")) is type(MOES[name]().get_submodule("model.layers.0"))
    assert unloaded.state_dict().keys() == MOES[name]().state_dict().keys()
    assert torch.equal(logits_of(unloaded), logits_of(MOES[name]()))


@pytest.mark.parametrize("name", MOES)
def test_gradients_of_trained_experts_equal_pefts_and_survive_checkpointing(name: str, tmp_path: Path) -> None:
    folders, (theirs, _) = experts_of(name, tmp_path)
    theirs(input_ids=tokens(), labels=tokens()).loss.backward()
    grads: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        model = mixture(folders, base=MOES[name](), use_trainable_adapters=True).train()
        if checkpointed:
            enable_checkpointing(model, use_reentrant=False)
        with model.fixed_scalings([1.0, 0.0]):
            model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        grads.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None and "lora_" in path})
    for path, grad in grads[0].items():
        assert_close(grads[1][path], grad, **CLOSE)
    for path, delta in deltas_of_gradients(theirs).items():
        layer = model.get_submodule(path).stack
        r = layer.ranks[0]
        grad_A, grad_B = layer.lora_A.grad[:, :r], layer.lora_B.grad[..., :r]
        A, B = (grad_B.mT, grad_A.mT) if name == "llama4" else (grad_A, grad_B)
        assert_close(A.flatten(0, 1), delta[0], **CLOSE)
        assert_close(B.permute(1, 2, 0).flatten(1), delta[1], **CLOSE)


def deltas_of_gradients(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": (
            module.lora_A["default"].weight.grad,
            module.lora_B["default"].weight.grad,
        )
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.ParamWrapper)
    }


@pytest.mark.parametrize("name", MOES)
def test_merging_and_one_adapter_of_a_fixed_mixture(name: str, tmp_path: Path) -> None:
    folders, models = experts_of(name, tmp_path)
    model = mixture(folders, base=MOES[name]())
    model.fix_routing([0.7, 0.4])
    expected = logits_of(model)
    assert model.save_fixed(tmp_path / "exact") == 0
    assert model.save_fixed(tmp_path / "nearest", rank=4) > 0
    alone: Any = loramix.PeftModel.from_pretrained(MOES[name](), tmp_path / "exact")
    assert_close(logits_of(alone), expected, **CLOSE)
    loramix.PeftModel.from_pretrained(MOES[name](), tmp_path / "nearest")
    merged = model.merge_and_unload()
    assert_close(logits_of(merged), expected, **CLOSE)
    place = next(iter(deltas(models[0], "down_proj")))
    update = merged.get_submodule(place).down_proj - MOES[name]().get_submodule(place).down_proj
    by_hand = sum(s * deltas(theirs, "down_proj")[place] for s, theirs in zip((0.7, 0.4), models, strict=True))
    assert_close(update.detach(), by_hand, **CLOSE)


@pytest.mark.parametrize("name", MOES)
def test_a_new_expert_is_read_by_peft_and_trains(name: str, tmp_path: Path) -> None:
    config = loramix.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=BOTH, task_type="CAUSAL_LM")
    model: Any = loramix.get_peft_model(MOES[name](), config)
    assert torch.equal(logits_of(model), logits_of(MOES[name]())) or not far(logits_of(model), logits_of(MOES[name]()))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(2):
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path)
    found = logits_of(model)
    assert far(found, logits_of(MOES[name]()))
    assert_close(logits_of(read_by_peft(MOES[name](), tmp_path)), found, **CLOSE)


def test_a_constant_router_works_and_one_that_reads_the_activation_is_refused(tmp_path: Path) -> None:
    folders, _ = experts_of("qwen3_moe", tmp_path)
    base = qwen3_moe()
    model: Any = loramix.get_peft_model(qwen3_moe(), loramix.XLoraConfig(adapters=folders, router="static")).eval()
    with model.fixed_scalings([0.5, 0.5]):
        assert far(logits_of(model), logits_of(base))
    assert_close(logits_of(model), logits_of(model))
    with pytest.raises(UnsupportedAdapterError, match=r"experts\.gate_up_proj"):
        loramix.get_peft_model(base, loramix.XLoraConfig(adapters=folders, router=EnergyRouter.kind))
    assert torch.equal(logits_of(base), logits_of(qwen3_moe()))


def test_info_names_the_parameters_and_their_rank(tmp_path: Path) -> None:
    folders, _ = experts_of("qwen3_moe", tmp_path, count=1, target_parameters=[*BOTH, "gate.weight"])
    (expert,) = formats.describe(folders["e0"]).experts
    assert expert.targets == ("down_proj", "gate", "gate_up_proj", "q_proj")
    assert (expert.ranks, expert.modules) == ((2,), 8)


def test_check_tells_of_parameters(tmp_path: Path) -> None:
    found = check_base(qwen3_moe(), ["q_proj", *BOTH, "gate.weight"])
    assert found.works
    assert {group.name: group.layers for group in found.targets} == {
        "model.layers.*.self_attn.q_proj": 2,
        "model.layers.*.mlp.experts.gate_up_proj": 2,
        "model.layers.*.mlp.experts.down_proj": 2,
        "model.layers.*.mlp.gate": 2,
    }


BAD: dict[str, tuple[dict[str, Any], type[errors.LoramixError], str]] = {
    "other matrices": ({"moe_intermediate_size": 48}, errors.AdapterMismatchError, "experts.gate_up_proj"),
    "more experts": ({"num_experts": 8}, errors.AdapterMismatchError, "(16, 64)"),
    "no block": ({"mlp_only_layers": [0]}, errors.AdapterMismatchError, "mlp.experts"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_block_of_another_base_is_refused(case: str, tmp_path: Path) -> None:
    changes, error, named = BAD[case]
    folders, _ = experts_of("qwen3_moe", tmp_path / "experts", count=1)
    base = qwen3_moe(**changes)
    caught = refused(error, base, tmp_path, lambda: loramix.PeftModel.from_pretrained(base, folders["e0"]))
    assert named in caught.received


def test_a_block_that_computes_in_an_unknown_way_is_named(tmp_path: Path) -> None:
    folders, _ = experts_of("qwen3_moe", tmp_path / "experts", count=1)
    base = qwen3_moe()
    del base.get_submodule("model.layers.0.mlp.experts").is_transposed
    load = lambda: loramix.PeftModel.from_pretrained(base, folders["e0"])  # noqa: E731
    caught = refused(UnsupportedAdapterError, base, tmp_path, load)
    assert "'model.layers.0.mlp.experts" in caught.received
    assert "Qwen3MoeExperts" in caught.received


def test_parameters_that_a_file_lacks_are_named(tmp_path: Path) -> None:
    folders, _ = experts_of("qwen3_moe", tmp_path / "experts", count=1)
    lacking = edited(folders["e0"], tmp_path / "lacking", target_parameters=BOTH[:1])
    base = qwen3_moe()
    caught = refused(
        errors.AdapterMismatchError, base, tmp_path, lambda: loramix.PeftModel.from_pretrained(base, lacking)
    )
    assert "target_parameters=['experts.gate_up_proj']" in caught.received


def test_what_peft_cannot_train_is_refused() -> None:
    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        loramix.get_peft_model(qwen3_moe(), loramix.LoraConfig(target_parameters=BOTH, use_dora=True))
    with pytest.raises(errors.ConfigurationError, match="target_parameters"):
        loramix.LoraConfig(target_parameters="experts.gate_up_proj")
    with pytest.raises(errors.ConfigurationError, match="target_parameters"):
        loramix.get_peft_model(qwen3_moe(), loramix.LoraConfig(target_parameters=["experts.up"]))
