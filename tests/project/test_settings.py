"""The settings that the other tests rely on are in force, in every worker."""

from __future__ import annotations

import warnings

import jaxtyping
import pytest
import torch

from loramix.routers.gating import activate


def test_shapes_in_signatures_are_executed() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="activate"):
        activate(torch.zeros(3), softmax=True, temperature=1.0)


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="told"):
        warnings.warn("told", stacklevel=1)
