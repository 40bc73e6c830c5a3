"""Finding `adapter_config.json` in an adapter's folder, and saying what a folder without it is."""

from __future__ import annotations

from pathlib import Path

from loramix.errors import CheckpointNotFoundError
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
    """Recognise the likeliest mistakes: a base model's folder, and one of the original X-LoRA library."""
    remedy = "Give the folder that save_pretrained wrote, or name its subfolder with subfolder=."
    if location.find(ORIGINAL_CONFIG_NAME):
        found = "which is a mixture of the original xlora library"
        remedy = "Load it with PeftModel.from_pretrained, or rewrite it: loramix convert FOLDER NEW --to peft."
    elif location.find("config.json"):
        found = "which is a model's folder, not an adapter's"
    else:
        found = "which has none"
    return CheckpointNotFoundError(
        f"An adapter's folder holds {CONFIG_NAME}.", received=f"{str(location)!r}, {found}", remedy=remedy
    )
