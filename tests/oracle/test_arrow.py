"""Arrow, and GenKnowSub, as PEFT computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model
from torch.testing import assert_close

from loramix import (
    AdapterMismatchError,
    ConfigurationError,
    LoraConfig,
    UnsupportedAdapterError,
    XLoraConfig,
    get_peft_model,
)
from loramix.formats import load_adapter
from loramix.model.general_knowledge import subtract_general_knowledge
from support.peft_side import PEFT_WARNINGS
from support.tiny import llama, save_expert, tokens

pytestmark = [pytest.mark.filterwarnings(each) for each in PEFT_WARNINGS]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def converged_experts(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Experts whose first singular value is so far from the second that 15 iterations of PEFT find its vector."""
    found = {}
    for seed, name in enumerate(names):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
        model: Any = get_peft_model(llama(), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path in model.adapted_modules:
                part = model.get_submodule(path).stack.parts[0]
                left, _, right = torch.linalg.svd(
                    torch.randn(part.B.shape[0], part.A.shape[1], generator=generator), full_matrices=False
                )
                values = torch.tensor([2.0, 0.8, 0.4, 0.2])  # (σ2 / σ1)^30 < 1e-6
                part.B.copy_(left[:, :4] * values.sqrt())
                part.A.copy_(values.sqrt().unsqueeze(1) * right[:4])
        model.save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


def peft_logits(folders: list[str], general: list[str] | None = None, **settings: Any) -> torch.Tensor:
    config = peft.ArrowConfig(router_temperature=1.0, use_gks=general is not None, rng_seed=0, **settings)
    model = create_arrow_model(llama(), folders, config, general_adapter_paths=general).eval()
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("top_k", [2, 3])
def test_arrow_is_pefts(top_k: int, tmp_path: Path) -> None:
    folders = converged_experts(tmp_path, ("a", "b", "c"))
    config: dict[str, Any] = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": top_k}
    ours: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=folders, router="arrow", **config)).eval()
    with torch.no_grad():
        logits = ours(tokens()).logits
    expected = peft_logits(list(folders.values()), top_k=top_k)
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, llama()(tokens()).logits, atol=1e-2)


def test_general_knowledge_is_subtracted_as_in_peft(tmp_path: Path) -> None:
    names, shared = ("a", "b", "c"), ("english", "french")
    folders = converged_experts(tmp_path, names + shared)
    general = [folders[name] for name in shared]
    new = subtract_general_knowledge({name: folders[name] for name in names}, general, tmp_path / "new")
    for path, weights in load_adapter("a", new["a"]).weights.items():
        means = [load_adapter(name, folders[name]).weights[path] for name in shared]
        own = load_adapter("a", folders["a"]).weights[path]
        assert_close(weights.A, own.A - (means[0].A + means[1].A) / 2)
        assert_close(weights.B, own.B - (means[0].B + means[1].B) / 2)
    config: dict[str, Any] = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 3}
    uniform: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=new, router="arrow", **config)).eval()
    expected = create_arrow_model(
        llama(),
        [folders[name] for name in names],
        peft.ArrowConfig(router_temperature=1.0, use_gks=True, rng_seed=0, top_k=3),
        general_adapter_paths=general,
    ).eval()
    with torch.no_grad():
        expected(tokens())  # PEFT subtracts at the first forward
    layer = expected.base_model.model.model.layers[0].self_attn.q_proj
    stack = uniform.get_submodule("model.layers.0.self_attn.q_proj").stack
    for expert in range(3):
        assert_close(stack.parts[expert].A, layer.lora_A[f"task_{expert}"].weight.detach())
        assert_close(stack.parts[expert].B, layer.lora_B[f"task_{expert}"].weight.detach())


def test_general_experts_of_other_sizes_are_refused(tmp_path: Path) -> None:
    one = save_expert(tmp_path / "one", llama(), target_modules=TARGETS)
    for name, settings, error, said in (
        ("rank", {"r": 8}, AdapterMismatchError, "of the same modules and ranks"),
        ("modules", {"target_modules": ["q_proj"]}, AdapterMismatchError, "of the same modules and ranks"),
        ("dora", {"use_dora": True}, UnsupportedAdapterError, "with DoRA or LoRA biases"),
    ):
        other = save_expert(tmp_path / name, llama(), **{"target_modules": TARGETS, **settings})
        with pytest.raises(error, match=said):
            subtract_general_knowledge({"one": one}, [other], tmp_path / "new")
    with pytest.raises(ConfigurationError, match="at least one expert"):
        subtract_general_knowledge({"one": one}, [], tmp_path / "new")
    assert not (tmp_path / "new").exists()
