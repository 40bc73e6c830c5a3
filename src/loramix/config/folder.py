"""Finding `adapter_config.json` in an adapter's folder, and saying what a folder without it is."""

from __future__ import annotations

import re
from pathlib import Path

from loramix.errors import CheckpointNotFoundError
from loramix.files.hub import is_local
from loramix.files.location import Location

CONFIG_NAME = "adapter_config.json"
ORIGINAL_CONFIG_NAME = "xlora_config.json"


def find_config(location: Location) -> Path:
    """The path of an adapter's configuration.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no `adapter_config.json` in it; the message says
            what the folder is instead.
    """
    path = location.find(CONFIG_NAME)
    if path is None:
        raise _no_adapter(location)
    return path


def _no_adapter(location: Location) -> CheckpointNotFoundError:
    """Recognise the likeliest mistakes: a base model's folder, one of another tool, and one around the adapter's."""
    remedy = "Give the folder that save_pretrained wrote, or name its subfolder with subfolder=."
    if location.find(ORIGINAL_CONFIG_NAME):
        found = "which is a mixture of the original xlora library"
        remedy = "Load it with PeftModel.from_pretrained, or rewrite it: loramix convert FOLDER NEW --to peft."
    elif known := recognised(location):
        found, remedy = known
    elif location.find("config.json"):
        found = "which is a model's folder, not an adapter's"
    else:
        found = "which has none"
    return CheckpointNotFoundError(
        f"An adapter's folder holds {CONFIG_NAME}.", received=f"{str(location)!r}, {found}", remedy=remedy
    )


def recognised(location: Location) -> tuple[str, str] | None:
    """What a folder without an adapter that can be read is, and what to do about it; None if it is nothing known."""
    names = location.names()
    folders = (name for name in sorted(names, key=_steps, reverse=True) if "." not in name)
    if CONFIG_NAME in names:  # folders beside it may be the experts of a mixture
        folders = (name for name in folders if _steps(name)[0] >= 0)
    folder = next((name for name in folders if _holds(location, name)), None)
    if folder is not None:
        place = str(location.below(folder))
        place = place if is_local(location.identifier) else f"hf://{place.removeprefix('hf://')}"
        return f"which holds an adapter in its folder {folder!r}", f"Give that folder: {place!r}."
    for pattern, found, remedy in _KNOWN:
        name = next((name for name in names if re.fullmatch(pattern, name)), None)
        if name is not None:
            return f"which holds {name!r}: {found}", remedy
    return None


def _steps(name: str) -> tuple[int, str]:
    """By the number at the end of a checkpoint's name; others come after all checkpoints."""
    number = re.fullmatch(r"checkpoint-(\d+)", name)
    return (int(number[1]), name) if number else (-1, name)


def _holds(location: Location, name: str) -> bool:
    try:
        return location.below(name).find(CONFIG_NAME) is not None
    except CheckpointNotFoundError:
        return False


MLX_REMEDY = (
    f"Save it as PEFT does: lora_A.weight = lora_a.T and lora_B.weight = lora_b.T under base_model.model.<module>, and "
    f"the {CONFIG_NAME} of LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=keys)."
)
KOHYA_REMEDY = (
    "Save it as PEFT does: lora_A.weight = lora_down.weight and lora_B.weight = lora_up.weight under "
    "base_model.model.<module> (dots for the underscores between modules), and the alphas as lora_alpha and "
    f"alpha_pattern of {CONFIG_NAME}."
)
_KNOWN = (
    (
        r"adapters\.(?:safetensors|npz)|\d+_adapters\.(?:safetensors|npz)",
        "an adapter of mlx-lm",
        MLX_REMEDY,
    ),
    (
        r".*\.gguf",
        "an adapter that was converted for llama.cpp",
        "Give the folder that it was converted from: convert_lora_to_gguf.py reads PEFT's layout.",
    ),
    (
        r"pytorch_lora_weights\.(?:safetensors|bin)",
        "an adapter of diffusers, for a pipeline of images",
        "Load it with diffusers (pipe.load_lora_weights); a mixture needs an expert of a transformers model.",
    ),
    (
        r"global_step\d+|zero_to_fp32\.py",
        "parts of a training checkpoint of DeepSpeed",
        "Gather them: load the checkpoint into the model (deepspeed.utils.zero_to_fp32."
        "load_state_dict_from_zero_checkpoint), and call model.save_pretrained(folder).",
    ),
    (
        r"pytorch_model_fsdp(?:_\d+|\.bin)|.*\.distcp",
        "parts of a training checkpoint of FSDP",
        "Gather them: resume the training with fsdp_state_dict_type FULL_STATE_DICT, and call "
        "trainer.save_model(folder).",
    ),
    (
        r"adapter_model(?:-\d+-of-\d+)?\.(?:safetensors|bin)",
        "an adapter's weights, of which a configuration or an index is missing",
        f"Copy {CONFIG_NAME}, and of shards adapter_model.safetensors.index.json, from where it was saved; or write "
        "the configuration anew: LoraConfig(r=…, lora_alpha=…, target_modules=[…]).save_pretrained(folder).",
    ),
)
"""Pattern of a file's or folder's name, what it is, and the remedy."""
