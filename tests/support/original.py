"""The original X-LoRA library: its folders, written by hand, and its forward in a few lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

CONFIG, CLASSIFIER = "xlora_config.json", "xlora_classifier.safetensors"
DEFAULTS: dict[str, Any] = {
    "enable_softmax": True,
    "enable_softmax_topk": False,
    "layerwise_scalings": False,
    "xlora_depth": 1,
    "xlora_size": 2048,
    "enable_relu_and_dropout": True,
    "use_bias": True,
    "xlora_dropout_p": 0.2,
    "use_trainable_adapters": False,
    "softmax_temperature": 1.0,
    "top_k_lora": None,
    "scaling_pass_value": 0.0,
    "global_scaling_weight": 1.0,
}


def classifier_of(config: Mapping[str, Any], experts: int, layers: int, **made: Any) -> dict[str, Tensor]:
    """Tensors of a classifier as the library lays them out; `made` are arguments of `torch.randn`."""
    widths = [config["hidden_size"], *[config["xlora_size"]] * (config["xlora_depth"] - 1)]
    step = 3 if config["enable_relu_and_dropout"] else 1
    keys = [*(f"inner.{i * step}" for i in range(len(widths) - 1)), "last"]
    outputs = [*widths[1:], experts * (layers if config["layerwise_scalings"] else 1)]
    tensors: dict[str, Tensor] = {}
    for key, rows, columns in zip(keys, outputs, widths, strict=True):
        tensors[f"{key}.weight"] = torch.randn(rows, columns, **made)
        if config["use_bias"]:
            tensors[f"{key}.bias"] = torch.randn(rows, **made)
    return tensors


def write_original(
    folder: Path, experts: Mapping[str, str | Path], layers: int, hidden_size: int = 64, **settings: Any
) -> Path:
    """A folder of the library with these experts in it, by name."""
    config = {
        "hidden_size": hidden_size,
        "base_model_id": "user/base",
        "adapters": list(experts),
        **DEFAULTS,
        **settings,
    }
    for name, place in experts.items():
        shutil.copytree(place, folder / name)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    torch.manual_seed(3)
    save_file(classifier_of(config, len(experts), layers), folder / CLASSIFIER)
    return folder


def edit_original(folder: Path, *without: str, **changes: Any) -> Path:
    """Change and remove fields of the configuration."""
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in values.items() if name not in without}))
    return folder


@torch.no_grad()
def forward_of_original(base: PreTrainedModel, folder: Path, ids: Tensor) -> Tensor:
    """Logits of the library's mixture, from its files: two passes, and every layer by itself."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / CLASSIFIER)
    names = list(config["adapters"])
    loras = [load_file(folder / name / "adapter_model.safetensors") for name in names]
    settings = [json.loads((folder / name / "adapter_config.json").read_text()) for name in names]
    paths = [path for path, _ in base.named_modules() if any(f"{_key(path)}.lora_A.weight" in lora for lora in loras)]
    scalings = torch.full((*ids.shape, len(paths), len(names)), config["scaling_pass_value"])

    def adapt(path: str, number: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            for e, (lora, saved) in enumerate(zip(loras, settings, strict=True)):
                if f"{_key(path)}.lora_A.weight" in lora:
                    x = inputs[0] * scalings[:, :, number, e, None]
                    delta = x @ lora[f"{_key(path)}.lora_A.weight"].T @ lora[f"{_key(path)}.lora_B.weight"].T
                    output = output + delta * saved["lora_alpha"] / saved["r"] * config["global_scaling_weight"]
            return output

        return base.get_submodule(path).register_forward_hook(hook)

    hooks = [adapt(path, number) for number, path in enumerate(paths)]
    hidden = base(ids, output_hidden_states=True).hidden_states[-1]
    inner = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("inner.")})
    for place in inner:
        hidden = nn.functional.linear(hidden, tensors[f"inner.{place}.weight"], tensors.get(f"inner.{place}.bias"))
        hidden = hidden.relu() if config["enable_relu_and_dropout"] else hidden
    logits = nn.functional.linear(hidden, tensors["last.weight"], tensors.get("last.bias"))
    if not config["layerwise_scalings"]:
        logits = logits.unsqueeze(2).expand(-1, -1, len(paths), -1)
    scalings = logits.reshape(*ids.shape, len(paths), len(names))
    if config["enable_softmax"]:
        scalings = (scalings / config["softmax_temperature"]).softmax(-1)
    if config["top_k_lora"] is not None:
        scalings = scalings * torch.zeros_like(scalings).scatter(-1, scalings.topk(config["top_k_lora"]).indices, 1)
    mixed = base(ids).logits
    for hook in hooks:
        hook.remove()
    return mixed


def _key(path: str) -> str:
    return f"base_model.model.{path}"
