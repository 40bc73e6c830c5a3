"""Experts whose modules had other names, or were others, in older versions of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix import errors
from support.disk import edited
from support.mixtures import far, logits_of, mixture
from support.peft_side import PEFT_WARNINGS, lora, read_by_peft, write_expert
from support.refusals import refused
from support.tiny import BLOCKS, GATED, build, mixtral, qwen3_moe

pytestmark = pytest.mark.filterwarnings(
    *PEFT_WARNINGS,
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",  # it looks at modules alone
)

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
Base = Callable[[], Any]
VISION: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def gemma3_vision() -> Any:
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    return build(
        hf.Gemma3ForConditionalGeneration,
        text_config={**GATED, **layers},
        vision_config={"hidden_size": 16, "intermediate_size": 32, **VISION},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    sizes = {"depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return build(
        hf.Qwen2VLForConditionalGeneration,
        text_config={**GATED, "rope_parameters": rope},
        vision_config={**sizes, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )


def llava() -> Any:
    return build(
        hf.LlavaForConditionalGeneration,
        text_config={**GATED, "model_type": "llama"},
        vision_config={**BLOCKS, **VISION, "intermediate_size": 32, "model_type": "clip_vision_model"},
        image_token_index=90,
    )


RENAMED: dict[str, tuple[Base, str, str]] = {  # the base model, the name of its language model, an older one
    "gemma3": (gemma3_vision, "model.language_model.", "language_model.model."),
    "llava": (llava, "model.language_model.", "language_model.model."),
    "qwen2_vl": (qwen2_vl, "model.language_model.", "model."),
}


def rewritten(folder: str, copy: Path, rename: Callable[[str], str]) -> str:
    shutil.copytree(folder, copy)
    save_file({rename(key): tensor for key, tensor in load_file(copy / WEIGHTS).items()}, copy / WEIGHTS)
    return str(copy)


@pytest.mark.parametrize("name", RENAMED)
def test_a_language_model_that_was_named_otherwise(name: str, tmp_path: Path) -> None:
    base, new, old = RENAMED[name]
    targets = r".*language_model.*\.(q_proj|down_proj)"
    patterns = {"rank_pattern": {new + "layers.1.mlp.down_proj": 5}, "alpha_pattern": {"q_proj": 3}}
    folder = write_expert(tmp_path / "new", base(), target_modules=targets, task_type=None, **patterns)
    older = rewritten(folder, tmp_path / "old", lambda key: key.replace(PREFIX + new, PREFIX + old))
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    renamed = {key.replace(new, old): rank for key, rank in config["rank_pattern"].items()}
    older = str(edited(older, tmp_path / "older", rank_pattern=renamed))
    expected = logits_of(lora(base(), folder))
    assert far(logits_of(base()), expected)
    model: Any = loramix.PeftModel.from_pretrained(base(), older)
    assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert all(path.startswith(new) for path in model.adapted_modules)
    model.save_pretrained(tmp_path / "again")
    assert_close(logits_of(lora(base(), str(tmp_path / "again"))), expected, atol=1e-5, rtol=1e-5)
    both = mixture({"old": older, "new": folder}, base=base())
    with both.fixed_scalings([0.25, 0.75]):
        assert_close(logits_of(both), expected, atol=1e-5, rtol=1e-5)


EXPERTS: dict[str, tuple[Base, str, dict[str, tuple[int, int]], str]] = {
    # the base model, its blocks' old name, the old projections with their sizes, the old name of what chooses
    "qwen3_moe": (qwen3_moe, "mlp", {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}, "gate"),
    "mixtral": (mixtral, "block_sparse_moe", {"w1": (64, 128), "w3": (64, 128), "w2": (128, 64)}, "gate"),
}


def old_expert(
    name: str, folder: Path, *, seed: int = 0, ranks: dict[str, int] | None = None, leave_out: str = "-", **config: Any
) -> str:
    """An expert as PEFT wrote it when each of a block's experts had linear layers."""
    base, block, projections, gate = EXPERTS[name]
    names = [projection for projection in projections if projection != leave_out]
    write_expert(folder, base(), seed=seed, target_modules=["q_proj"], **config)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / WEIGHTS)
    saved = json.loads((folder / "adapter_config.json").read_text())
    for layer in range(2):
        place = f"{PREFIX}model.layers.{layer}.{block}"
        parts = {f"{place}.experts.{n}.{p}": (p, *projections[p]) for n in range(4) for p in names}
        for key, (projection, inputs, outputs) in {**parts, f"{place}.{gate}": (gate, 64, 4)}.items():
            r = (ranks or {}).get(projection, saved["r"])
            tensors[f"{key}.lora_A.weight"] = 0.2 * torch.randn(r, inputs, generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.2 * torch.randn(outputs, r, generator=generator)
    save_file(tensors, folder / WEIGHTS)
    saved["target_modules"] += [*names, gate]
    saved["rank_pattern"] = ranks or {}
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    return str(folder)


def merged_by_hand(name: str, folder: str) -> Any:
    """The base model with every update of an old expert added to its half of the parameter that holds it now."""
    base, block, projections, gate = EXPERTS[name]
    model, tensors = base(), load_file(Path(folder) / WEIGHTS)
    config = json.loads((Path(folder) / "adapter_config.json").read_text())

    def update(key: str, leaf: str) -> Tensor:
        A, B = tensors.get(f"{key}.lora_A.weight"), tensors.get(f"{key}.lora_B.weight")
        if A is None or B is None:
            return torch.zeros(())
        alpha = config["alpha_pattern"].get(leaf, config["lora_alpha"])
        return B @ A * (alpha / (len(A) ** 0.5 if config["use_rslora"] else len(A)))

    first, second, last = projections
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            place = f"{PREFIX}model.layers.{i}"
            layer.self_attn.q_proj.weight += update(f"{place}.self_attn.q_proj", "q_proj")
            layer.mlp.gate.weight += update(f"{place}.{block}.{gate}", gate)
            for n in range(4):
                experts = f"{place}.{block}.experts.{n}"
                half = projections[first][1]
                layer.mlp.experts.gate_up_proj[n, :half] += update(f"{experts}.{first}", first)
                layer.mlp.experts.gate_up_proj[n, half:] += update(f"{experts}.{second}", second)
                layer.mlp.experts.down_proj[n] += update(f"{experts}.{last}", last)
    return model


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "a projection is missing": {"leave_out": "up_proj"},
    "ranks and alphas": {"ranks": {"up_proj": 2, "w3": 2, "gate": 3}, "alpha_pattern": {"up_proj": 3, "w1": 5}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_a_block_that_were_linear_layers(name: str, case: str, tmp_path: Path) -> None:
    folders = {f"e{i}": old_expert(name, tmp_path / f"e{i}", seed=i, **CASES[case]) for i in range(2)}
    model = mixture(folders, base=EXPERTS[name][0]())
    for i, folder in enumerate(folders.values()):
        expected = logits_of(merged_by_hand(name, folder))
        assert far(expected, logits_of(EXPERTS[name][0]()))
        with model.fixed_scalings([float(i == e) for e in range(2)]):
            assert_close(logits_of(model), expected, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "mixture")
    again: Any = loramix.PeftModel.from_pretrained(EXPERTS[name][0](), tmp_path / "mixture")
    assert_close(logits_of(again), logits_of(model), atol=1e-6, rtol=1e-6)
    theirs = read_by_peft(EXPERTS[name][0](), tmp_path / "mixture" / "e0")
    assert_close(logits_of(theirs), logits_of(merged_by_hand(name, folders["e0"])), atol=2e-5, rtol=1e-4)


def without(folder: str, copy: Path, part: str) -> str:
    shutil.copytree(folder, copy)
    save_file({k: t for k, t in load_file(copy / WEIGHTS).items() if part not in k}, copy / WEIGHTS)
    return str(copy)


def test_what_an_old_block_lacks_is_named_and_the_base_stays(tmp_path: Path) -> None:
    good = old_expert("qwen3_moe", tmp_path / "good")
    base = qwen3_moe()
    lacking = without(good, tmp_path / "lacking", "layers.0.mlp.experts.2.")
    caught = refused(
        errors.IncompleteCheckpointError, base, tmp_path, lambda: loramix.PeftModel.from_pretrained(base, lacking)
    )
    assert "'model.layers.0.mlp.experts'" in caught.received
    wide = qwen3_moe(moe_intermediate_size=48)
    caught = refused(errors.AdapterMismatchError, wide, tmp_path, lambda: loramix.PeftModel.from_pretrained(wide, good))
    assert "mlp.experts.0.down_proj" in caught.received
