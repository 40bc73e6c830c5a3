"""What PEFT 0.21.2 was measured to do wrong, one test each (docs/semantics.md §5).

Saving, and wrong experts, are tested elsewhere.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from loramix import PeftModel, UnsupportedOperationError
from loramix.layers.routing import ConstantRouting
from loramix.layers.slot import current
from loramix.passes.scalings_log import CAPACITY, ScalingsLog
from support.mixtures import HARD, SPARSE, far, logits_of, mixture
from support.tiny import ARCHITECTURES, gpt2, llama, tokens


def test_names_keep_the_order_of_the_mapping_and_not_of_the_alphabet(experts: Any, tmp_path: Path) -> None:
    folders = experts("llama")
    model = mixture({"1": folders["math"], "0": folders["code"]})
    assert model.expert_names == ["1", "0"]
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.expert_names == ["1", "0"]
    assert torch.equal(logits_of(loaded), logits_of(model))
    alone = PeftModel.from_pretrained(llama(), folders["math"])
    for one in (model, loaded):
        with one.fixed_scalings([1.0, 0.0]):
            assert_close(logits_of(one), logits_of(alone))


@pytest.mark.parametrize(
    "names", [("math", "code"), ("0", "1"), ("a.b", "lora_A"), ("default", "base_layer"), ("数学", "layers.0")]
)
def test_any_name_that_can_be_a_folder_works(names: tuple[str, str], experts: Any, tmp_path: Path) -> None:
    folders = list(experts("llama").values())
    model = mixture(dict(zip(names, folders, strict=False)), xlora_depth=3)
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(names)
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_experts_are_replaced_by_name_and_the_others_stay(experts: Any, tmp_path: Path) -> None:
    folders = experts("llama")
    model = mixture(folders)
    model.save_pretrained(tmp_path)
    replaced: Any = PeftModel.from_pretrained(llama(), tmp_path, adapters={"code": folders["math"]})
    assert replaced.expert_names == ["math", "code", "prose"]
    with replaced.fixed_scalings([0.0, 1.0, 0.0]), model.fixed_scalings([1.0, 0.0, 0.0]):
        assert_close(logits_of(replaced), logits_of(model))
    with replaced.fixed_scalings([0.0, 0.0, 1.0]), model.fixed_scalings([0.0, 0.0, 1.0]):
        assert_close(logits_of(replaced), logits_of(model))


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_bases_use_cache_does_not_matter(use_cache: bool, experts: Any) -> None:
    base = llama()
    base.config.use_cache = use_cache
    model = mixture(experts("llama"), base=base)
    assert model.config.use_cache == use_cache
    expected = mixture(experts("llama"))
    assert torch.equal(logits_of(model), logits_of(expected))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **settings), expected.generate(tokens(), **settings))


def test_trained_experts_are_kept(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts("llama"), use_trainable_adapters=True).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert any("lora_A" in name and not torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path)
    for trainable in (True, False):
        loaded: Any = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=trainable).eval()
        assert torch.equal(logits_of(loaded), logits_of(model))
        assert loaded.peft_config["default"].use_trainable_adapters


CALLS = {
    "merge_and_unload": "fix_routing",
    "merge_adapter": "merge_and_unload()",
    "unmerge_adapter": "merge_and_unload()",
    "load_adapter": "adapters=",
    "add_adapter": "get_peft_model",
    "set_adapter": "fixed_scalings",
    "delete_adapter": "unload()",
    "enable_adapters": "enable_adapter_layers",
    "disable_adapters": "disable_adapter",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_without_meaning_explains_itself_and_changes_nothing(call: str, experts: Any) -> None:
    model = mixture(experts("llama"))
    before, modules = logits_of(model), [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedOperationError) as caught:
        getattr(model, call)()
    assert call.removesuffix("_adapter") in caught.value.received or call in caught.value.received
    assert CALLS[call] in caught.value.remedy
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(logits_of(model), before)


def test_disabling_nests(experts: Any) -> None:
    model, base = mixture(experts("llama")), logits_of(llama())
    whole = logits_of(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits_of(model), base)
        assert torch.equal(logits_of(model), base)
        with model.fixed_scalings([1.0, 0.0, 0.0]):
            assert far(logits_of(model), base)
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model), whole)


def test_disabling_ends_with_an_error_inside(experts: Any) -> None:
    model = mixture(experts("llama"))
    whole = logits_of(model)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits_of(model), whole)


def test_a_forward_that_fails_leaves_nothing_behind(experts: Any) -> None:
    model = mixture(experts("llama"))
    whole = logits_of(model)
    with pytest.raises(IndexError):
        model(tokens() + 1000)
    assert torch.equal(logits_of(model), whole)
    with pytest.raises(RuntimeError, match="inside the passes"):
        current()


def test_disabled_layers_stay_disabled_until_enabled(experts: Any) -> None:
    model = mixture(experts("llama"))
    whole = logits_of(model)
    model.disable_adapter_layers()
    assert torch.equal(logits_of(model), logits_of(llama()))
    model.enable_adapter_layers()
    assert torch.equal(logits_of(model), whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_deep_copy_after_a_forward_is_a_model_of_its_own(architecture: str, experts: Any) -> None:
    model = mixture(experts(architecture), architecture)
    expected = logits_of(model)
    model(tokens(), labels=tokens()).loss.backward()
    twin = copy.deepcopy(model)
    assert isinstance(twin, PeftModel)
    assert torch.equal(logits_of(twin), expected)
    twin.set_global_scaling_weight(0.0)
    with torch.no_grad():
        twin.internal_xlora_classifier.layers[-1].weight.zero_()
    assert torch.equal(logits_of(model), expected)
    with model.disable_adapter():
        assert far(logits_of(model), expected)
        twin.set_global_scaling_weight(1.0)
        assert far(logits_of(twin), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_moves_to_another_dtype_after_a_forward(dtype: torch.dtype, experts: Any) -> None:
    model = mixture(experts("llama"))
    expected = logits_of(model)
    moved = logits_of(model.to(dtype))
    assert moved.dtype == dtype
    assert model.internal_xlora_classifier.layers[0].weight.dtype == torch.float32
    assert_close(moved.float(), expected, atol=0.05 if dtype == torch.bfloat16 else 1e-4, rtol=0.05)
    assert model.generate(tokens(), max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_it_is_pickled_where_its_base_is(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts("llama"))
    expected = logits_of(model)
    again = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for one in (again, torch.load(buffer, weights_only=False)):
        assert isinstance(one, PeftModel)
        assert type(one) is type(model)
        assert torch.equal(logits_of(one), expected)
        one.save_pretrained(tmp_path)
        assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path)), expected)
        one.unload()
        assert torch.equal(logits_of(one), logits_of(llama()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_half_precision_keeps_its_dtype_through_a_save(
    dtype: torch.dtype, experts: Any, tmp_path: Path
) -> None:
    model = mixture(experts("llama"), base=llama().to(dtype))
    expected = logits_of(model)
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(llama().to(dtype), tmp_path)), expected)


def router_of_bias(model: Any, logits: list[float]) -> None:
    """Every token gets these logits."""
    last = model.internal_xlora_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(logits))


def test_a_logit_of_zero_among_the_kept_is_kept(experts: Any) -> None:
    model = mixture(experts("llama"), **SPARSE)
    router_of_bias(model, [0.0, 1.0, -1.0])
    found = logits_of(model)
    weights = torch.tensor([0.0, 1.0]).softmax(0)
    with model.fixed_scalings([*weights.tolist(), 0.0]):
        assert_close(found, logits_of(model))


def test_the_scaling_pass_gives_all_experts_its_value_whatever_top_k_is(experts: Any) -> None:
    seen: list[Any] = []
    model = mixture(experts("llama"), scaling_pass_value=0.5, **{**HARD, "top_k_lora": 1})
    layer = model.get_submodule(model.adapted_modules[0])
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(current()))
    logits_of(model)
    handle.remove()
    first, second = seen
    assert isinstance(first, ConstantRouting)
    assert first.value == 0.5
    assert ((second.scalings != 0).sum(-1) == 1).all()


def test_the_log_does_not_grow_for_ever() -> None:
    log = ScalingsLog(capacity=3)
    log.enabled = True
    weights = torch.zeros(1, 1, 1, 2, requires_grad=True)
    for i in range(5):
        log.add(weights + i, layers=4)
    assert [entry[0, 0, 0, 0].item() for entry in log.entries()] == [2.0, 3.0, 4.0]
    assert not any(entry.requires_grad for entry in log.entries())
    assert CAPACITY <= 100_000


def test_no_tensor_with_a_graph_stays_on_the_model(experts: Any) -> None:
    model = mixture(experts("llama")).train()
    model.enable_scalings_logging()
    model(tokens(), labels=tokens()).loss.backward()
    assert not model.get_latest_scalings().requires_grad
    assert not any(entry.requires_grad for entry in model.get_scalings_log())
    for module in model.modules():
        left = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor) and not value.is_leaf]
        assert left == []


class PackedLinear(nn.Module):
    """A linear layer as quantisers make them: sizes as attributes, two 4-bit weights in each byte."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (linear.weight.detach() / scale).round().to(torch.int8) + 8
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (codes[:, ::2] + 16 * codes[:, 1::2].to(torch.uint8)).to(torch.uint8))

    def dense(self) -> torch.Tensor:
        codes = torch.stack([self.weight % 16, self.weight // 16], dim=-1).flatten(1)
        return (codes.float() - 8) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


def packed(dense: bool = False) -> Any:
    base: Any = llama()
    for block in base.model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.mlp, "down_proj"), (block.mlp, "up_proj")):
            layer = PackedLinear(getattr(parent, name))
            if dense:
                getattr(parent, name).weight.data = layer.dense()
            else:
                setattr(parent, name, layer)
    return base


def test_a_quantised_layer_is_a_black_box(experts: Any, tmp_path: Path) -> None:
    assert tuple(packed().model.layers[0].mlp.up_proj.weight.shape) == (128, 32)
    model, same = (mixture(experts("llama"), base=packed(dense=dense)) for dense in (False, True))
    assert_close(logits_of(model), logits_of(same))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **settings), same.generate(tokens(), **settings))
    found = [one.train()(tokens(), labels=tokens()).loss for one in (model, same)]
    torch.stack(found).sum().backward()
    grads = [one.internal_xlora_classifier.layers[0].weight.grad for one in (model, same)]
    assert_close(*grads)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(packed(), tmp_path)), logits_of(model))
    model.unload()
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_gpt2_saves_and_loads(experts: Any, tmp_path: Path) -> None:
    model = mixture(experts("gpt2"), "gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(gpt2(), tmp_path)), logits_of(model))
