"""`arrow` and `norm`: made from the experts' tensors, saved with what was made, and made anew for other experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from loramix import ConfigurationError, PeftModel, XLoraConfig, get_peft_model
from loramix.passes.state import attach
from loramix.routers import ArrowRouter
from loramix.routers.arrow import direction
from support.routers import Seen
from support.tiny import TARGETS, llama, save_expert, save_experts, tokens

Experts = Callable[[str], dict[str, str]]
both = pytest.mark.parametrize("kind", ["arrow", "norm"])


def mixture(folders: dict[str, str], kind: str, **config: Any) -> Any:
    settings = XLoraConfig(hidden_size=64, adapters=folders, router=kind, **config)
    return get_peft_model(llama(), settings).eval()


@torch.no_grad()
def forward(model: Any) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """What the router made of one batch, and each layer's input and stack."""
    hook, inputs = Seen(), {}
    detach = attach(model, hook)
    for path in model.adapted_modules:
        layer = model.get_submodule(path)
        layer.register_forward_pre_hook(lambda m, args, path=path: inputs.update({path: (args[0], m.stack)}))
    model(tokens())
    detach()
    return hook.outputs[0], inputs


def test_arrows_logits_are_the_first_right_singular_vectors(experts: Experts) -> None:
    output, inputs = forward(mixture(experts("llama"), "arrow"))
    for layer, (x, stack) in enumerate(inputs.values()):
        for expert, weights in stack.parts.items():
            v = torch.linalg.svd(weights.B @ weights.A)[2][0]
            assert_close(output.logits[:, :, layer, expert], (x @ v).abs(), atol=1e-4, rtol=1e-4)


def test_norms_logits_are_those_of_its_equation(experts: Experts) -> None:
    model = mixture(experts("llama"), "norm")
    torch.manual_seed(2)
    mean, deviation = torch.randn_like(model.router.mean), 1 + torch.rand_like(model.router.mean)
    start, _ = forward(model)
    model.router.assign(mean, deviation)
    output, inputs = forward(model)
    for layer, (x, stack) in enumerate(inputs.values()):
        for expert, weights in stack.parts.items():
            answer = (x @ weights.A.T @ weights.B.T).norm(dim=-1).log()
            z = (answer - mean[layer, expert]) / deviation[layer, expert]
            assert_close(output.logits[:, :, layer, expert], z, atol=1e-4, rtol=1e-4)
    x, stack = next(iter(inputs.values()))
    weights = stack.parts[0]
    relative = ((x @ weights.A.T @ weights.B.T).norm(dim=-1) / (weights.B @ weights.A).norm()).log()
    assert_close(start.logits[:, :, 0, 0], relative, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_direction_needs_no_full_rank(rank: int) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(4, 9), torch.randn(7, 4)
    A[rank:] = 0
    v = torch.linalg.svd(B @ A)[2][0]
    w = direction(A, B)
    assert_close((A.T @ w * v).sum().abs(), torch.ones(()))
    assert_close((A.T @ w).norm(), torch.ones(()))


@both
def test_an_expert_without_a_layer_is_left_out_of_the_softmax(kind: str, tmp_path: Path) -> None:
    folders = save_experts(tmp_path, "llama")
    folders["math"] = save_expert(tmp_path / "few", llama(), target_modules=["q_proj"])
    model = mixture(folders, kind)
    model.get_submodule("model.layers.0.mlp.up_proj").stack.parts[1].B.zero_()
    model.get_submodule("model.layers.1.mlp.up_proj").stack.parts[1].B.zero_()
    model.get_submodule("model.layers.1.mlp.up_proj").stack.parts[2].B.zero_()
    model.router.follow([model.get_submodule(path).stack.parts for path in model.adapted_modules])
    output, _ = forward(model)
    paths = model.adapted_modules
    assert (output.final[:, :, paths.index("model.layers.0.self_attn.q_proj")] > 0).all()
    assert (output.final[:, :, paths.index("model.layers.0.self_attn.v_proj"), 0] == 0).all()
    assert_close(output.final[:, :, paths.index("model.layers.0.mlp.up_proj"), 2], torch.ones(2, 9))
    assert output.logits.isfinite().all()  # in a layer where all experts are absent, too
    assert_close(output.final.sum(-1), torch.ones(output.final.shape[:-1]))
    capped = mixture(folders, kind, enable_softmax=False, enable_softmax_topk=True, top_k_lora=2)
    output, _ = forward(capped)
    assert (output.final[:, :, paths.index("model.layers.0.self_attn.v_proj"), 0] == 0).all()


@both
def test_a_loaded_router_is_the_saved_one_and_replaced_experts_get_new_tensors(
    kind: str, experts: Experts, tmp_path: Path
) -> None:
    model = mixture(experts("llama"), kind)
    if kind == "norm":
        model.router.assign(torch.randn_like(model.router.mean), 1 + torch.rand_like(model.router.mean))
    saved = {name: tensor.clone() for name, tensor in model.router.state_dict().items()}
    model.save_pretrained(tmp_path / "mixture")
    loaded: Any = PeftModel.from_pretrained(llama(), tmp_path / "mixture")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.router.state_dict().items())
    other = save_expert(tmp_path / "other", llama(), seed=9, r=6, target_modules=TARGETS["llama"])
    replaced: Any = PeftModel.from_pretrained(llama(), tmp_path / "mixture", adapters={"code": other})
    before, _ = forward(loaded)
    after, _ = forward(replaced)
    assert_close(after.logits[:, :, 0, [0, 2]], before.logits[:, :, 0, [0, 2]], atol=1e-5, rtol=1e-5)
    fresh = mixture({**experts("llama"), "code": other}, kind)
    if kind == "arrow":
        assert_close(after.logits, forward(fresh)[0].logits, atol=1e-5, rtol=1e-5)
        return
    assert_close(replaced.router.factors, fresh.router.factors)
    moved = (saved["mean"] - mixture(experts("llama"), kind).router.mean)[:, [0, 2]].mean(1)
    assert_close(replaced.router.mean[:, 1], fresh.router.mean[:, 1] + moved, atol=1e-5, rtol=1e-5)
    assert_close(replaced.router.deviation[:, 1], saved["deviation"][:, [0, 2]].mean(1))


@both
def test_experts_that_train_and_gating_without_softmax_are_refused(kind: str, experts: Experts) -> None:
    with pytest.raises(ConfigurationError, match="made from the experts, which do not train"):
        mixture(experts("llama"), kind, use_trainable_adapters=True)
    with pytest.raises(ConfigurationError, match="made into scalings by a softmax"):
        mixture(experts("llama"), kind, enable_softmax=False)


@both
@pytest.mark.parametrize(
    ("targets", "settings"),
    [(["q_proj"], {"use_dora": True}), (["embed_tokens", "v_proj"], {}), (["down_proj"], {"lora_bias": True})],
    ids=["DoRA", "embedding", "LoRA bias"],
)
def test_every_kind_of_layer(kind: str, targets: list[str], settings: Any, tmp_path: Path) -> None:
    folders = {
        name: save_expert(tmp_path / name, llama(), seed=i, r=2 + i, target_modules=targets, **settings)
        for i, name in enumerate(("a", "b"))
    }
    output, _ = forward(mixture(folders, kind))
    assert output.final.isfinite().all()
    assert output.final.std(0).max() > 1e-3
    alone: Any = PeftModel.from_pretrained(llama(), folders["a"])
    assert_close(mixture({"a": folders["a"]}, kind)(tokens()).logits, alone(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_bfloat16_directions_are_those_of_the_rounded_experts(experts: Experts) -> None:
    model: Any = get_peft_model(
        llama().to(torch.bfloat16), XLoraConfig(hidden_size=64, adapters=experts("llama"), router="arrow")
    )
    exact = mixture(experts("llama"), "arrow")
    assert isinstance(model.router, ArrowRouter)
    assert model.router.directions.dtype == torch.float32
    forward(model)
    forward(exact)
    assert_close(model.get_latest_scalings(), exact.get_latest_scalings(), atol=0.05, rtol=0.05)


@both
def test_an_expert_whose_product_is_zero_is_left_out(kind: str, experts: Experts) -> None:
    """As of a padded rank: neither A nor B is zero, and B A is."""
    model = mixture(experts("llama"), kind)
    part = model.get_submodule("model.layers.0.mlp.up_proj").stack.parts[1]
    part.A[:-1].zero_()
    part.B[:, -1].zero_()
    model.router.follow([model.get_submodule(path).stack.parts for path in model.adapted_modules])
    output, _ = forward(model)
    assert (output.final[:, :, model.adapted_modules.index("model.layers.0.mlp.up_proj"), 1] == 0).all()
    assert output.logits.isfinite().all()
