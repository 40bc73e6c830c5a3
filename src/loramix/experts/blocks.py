"""Mixture-of-experts blocks of a base model, and their parameters as layers that experts adapt.

A block holds the matrices of its own N experts in one parameter for each projection. What it computes is known where
transformers' experts interface runs it (`use_experts_implementation`), and for Llama 4. N, in, out: matrices in a
parameter, and the sizes of each.

Source: transformers, `integrations/moe.py`; PEFT 0.21.2, `tuners/lora/layer.py`, `ParamWrapper`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from loramix._compat import BlockSettings

COMPUTED = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""The dtypes that layers compute in; others hold quantised numbers."""


class BlockForm(NamedTuple):
    """How a block computes.

    Attributes:
        up: the name of its up projection, which with a gate holds the gate's matrix too.
        settings: what it says to the experts interface.
        dense: whether it is given all tokens N times (Llama 4), not each token with the numbers of its experts.
    """

    up: str
    settings: BlockSettings
    dense: bool = False

    @property
    def parameters(self) -> tuple[str, str]:
        """The names of the up and down projections."""
        return self.up, DOWN


DOWN = "down_proj"


def form_of(module: nn.Module) -> BlockForm | None:
    """How a block computes; None if the module is no such block, or one that computes in an unknown way."""
    from loramix._compat import BlockSettings, block_settings  # with it come all models of transformers

    settings = block_settings(module)
    if settings is not None:
        form = BlockForm("gate_up_proj" if settings.has_gate else "up_proj", settings)
    elif any(kind.__name__ == "Llama4TextExperts" for kind in type(module).__mro__):
        form = BlockForm("gate_up_proj", BlockSettings(is_transposed=True, has_bias=False), dense=True)
    else:
        return None
    weights = [getattr(module, name, None) for name in form.parameters]
    plain = all(isinstance(w, nn.Parameter) and w.dim() == 3 and w.dtype in COMPUTED for w in weights)
    return form if plain else None


class BlockMatrices(nn.Module):
    """One parameter of a block, as a layer to adapt. It is no module of the base model, and is never called.

    Args:
        block: the block; it is not registered here.
        name: the parameter's.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.name = name

    block: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return cast(nn.Parameter, getattr(self.block, self.name))

    @property
    def form(self) -> BlockForm:
        """How the block computes."""
        form = form_of(self.block)
        assert form is not None
        return form

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, in and out."""
        count, first, second = self.weight.shape
        return (count, first, second) if self.form.settings.is_transposed else (count, second, first)

    @property
    def exchanged(self) -> bool:
        """Whether A and B change places in PEFT's files."""
        return self.form.dense

    def extra_repr(self) -> str:
        return self.name


def with_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """A base model's modules by path, and after each block its parameters that experts can adapt."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        found[path] = module
        form = form_of(module)
        if form is not None:
            names = [name for name, _ in module.named_parameters(recurse=False) if name in form.parameters]
            found.update({f"{path}.{name}".removeprefix("."): BlockMatrices(module, name) for name in names})
    return found


def called_module(layer: nn.Module) -> nn.Module:
    """The module of the base model that is called where a layer is adapted: its block, or itself."""
    return layer.block if isinstance(layer, BlockMatrices) else layer
