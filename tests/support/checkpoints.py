"""Experts and mixtures in memory, how to compare them, and the tiny models that PEFT trains experts for."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.experts.adapter import Adapter, LoraWeights
from loramix.formats import MixtureCheckpoint
from support.tiny import gpt2, llama

HIDDEN = 16


def make_expert(name, *, seed=0, r=2, modules=("model.layers.0.q", "model.layers.1.q"), **config):
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        return torch.randn(*shape, generator=generator)

    settings = LoraConfig(r=r, lora_alpha=4, target_modules=["q"], base_model_name_or_path="user/base", **config)
    weights = {
        path: LoraWeights(
            values(r, HIDDEN),
            values(HIDDEN, r),
            bias=values(HIDDEN) if settings.lora_bias else None,
            magnitude=values(HIDDEN) if settings.use_dora else None,
        )
        for path in modules
    }
    return Adapter(name, settings, weights)


def xlora_config(**changes):
    """A configuration of two experts, of which nothing warns."""
    return XLoraConfig(**{"hidden_size": 64, "adapters": {"math": "a", "code": "b"}, **changes})


def make_mixture(*, seed=0, names=("math", "code"), **config):
    """The arguments of `save_mixture` after the folder; every tensor depends on the seed."""
    experts = [make_expert(name, seed=seed + i, r=2 + i) for i, name in enumerate(names)]
    settings = XLoraConfig(**{"hidden_size": HIDDEN, "adapters": {name: f"user/{name}" for name in names}, **config})
    generator = torch.Generator().manual_seed(seed)
    shapes = MixtureCheckpoint(settings, {}, experts).router_shapes()
    return settings, {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}, experts


def edit_config(folder, **changes):
    """Change fields of a saved configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    """Pass the tensors of a saved adapter through a function; the file's metadata stay."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = {key: tensor.clone() for key, tensor in change(load_file(path)).items()}
    path.unlink()  # an expert that was read before may still map it
    save_file(changed, path, metadata)


def same_expert(one, two):
    """Whether two experts are equal, bit by bit."""
    return (
        one.config == two.config
        and sorted(one.weights) == sorted(two.weights)
        and all(same_tensors(vars(one.weights[path]), vars(two.weights[path])) for path in one.weights)
        and same_tensors(one.base_weights, two.base_weights)
    )


def same_tensors(one, two):
    return set(one) == set(two) and all(
        torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype
        if isinstance(one[key], torch.Tensor) and isinstance(two[key], torch.Tensor)
        else one[key] is two[key]
        for key in one
    )


def contents(folder):
    """Every file below a folder, but for the journal and temporaries: relative path -> bytes."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if ".loramix-" not in name}


def tiny_llama():
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 24}
    return llama(use_cache=False, **sizes)


def tiny_gpt2():
    return gpt2(n_embd=HIDDEN, n_head=2, n_positions=32, vocab_size=24)


PEFT_EXPERTS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
}
