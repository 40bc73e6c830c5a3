"""Where a configuration lies: `adapter_config.json` in an adapter's folder, and what a folder without one may be."""

from __future__ import annotations

import os
from pathlib import Path

from loramix.errors import CheckpointNotFoundError
from loramix.files.hub import HubOptions, find_file

CONFIG_NAME = "adapter_config.json"


def find_config(identifier: str | os.PathLike[str], options: HubOptions) -> Path:
    """The path of an adapter's configuration.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or no `adapter_config.json` in it; the message says
            what the folder holds instead.
    """
    path = find_file(identifier, CONFIG_NAME, options)
    if path is None:
        raise _no_adapter(identifier, options)
    return path


def _no_adapter(identifier: str | os.PathLike[str], options: HubOptions) -> CheckpointNotFoundError:
    """Tell the likeliest mistakes apart: a base model's folder, the original library's, any other."""
    remedy = "Give the folder that save_pretrained wrote, or subfolder= where it lies deeper."
    if find_file(identifier, "xlora_config.json", options):
        found = "which is a checkpoint of the original xlora library"
        remedy = "Give its experts, one folder each, to a new XLoraConfig(adapters={…}); its layout is not read."
    elif find_file(identifier, "config.json", options):
        found = "which is a model's folder, not an adapter's"
    else:
        found = "which has none"
    place = os.fspath(identifier) + (f", subfolder {options.subfolder}" if options.subfolder else "")
    return CheckpointNotFoundError(
        f"An adapter's folder holds {CONFIG_NAME}.", received=f"{place!r}, {found}", remedy=remedy
    )
