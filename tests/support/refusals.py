"""An error of ours that changed nothing: how to see that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from loramix import errors
from support.disk import everything_in


def bitwise(base: PreTrainedModel) -> object:
    return (
        type(base),
        [(name, type(module), module.training) for name, module in base.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype, p.detach().numpy().tobytes()) for name, p in base.named_parameters()],
        base.config.to_dict(),
    )


def refused(error: type[errors.LoramixError], base: Any, folder: Path, call: Callable[[], object]) -> Any:
    """The error; nothing has changed in the base model or in the folder."""
    model_before, disk_before = bitwise(base), everything_in(folder)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert bitwise(base) == model_before
    assert everything_in(folder) == disk_before
    assert all((caught.value.rule, caught.value.received, caught.value.remedy))
    assert caught.value.rule in str(caught.value)
    assert caught.value.remedy in str(caught.value)
    return caught.value
