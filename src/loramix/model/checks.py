"""What is checked of a base model, experts and a router before the base model is changed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, ModelError, UnsupportedAdapterError
from loramix.experts.base_model import Backbones
from loramix.experts.blocks import BlockMatrices
from loramix.experts.dry_run import hidden_size_of
from loramix.layers.inject import Site
from loramix.layers.layer import XLoraLayer
from loramix.passes.checkpointing import route_checkpoints
from loramix.passes.text_pass import embedding_of
from loramix.routers.gating import gating_of
from loramix.routers.router import Router, router_class


def check_plain(model: PreTrainedModel) -> None:
    """Check that experts can be put on a model.

    Raises:
        ModelError: no model of transformers, one that is divided among processes, or one that carries experts.
        ConfigurationError: its gradient checkpointing is re-entrant.
    """
    if not isinstance(cast(object, model), PreTrainedModel):
        wrapped = any(isinstance(getattr(model, name, None), PreTrainedModel) for name in ("module", "_orig_mod"))
        raise ModelError(
            "The base model is a transformers PreTrainedModel.",
            received=f"a {type(model).__name__}{' around one' if wrapped else ''}",
            remedy="put the experts on the model itself, and wrap or compile the result"
            if wrapped
            else "load it with AutoModelForCausalLM.from_pretrained(…); of a model of PEFT, pass model.unload()",
        )
    if any(_is_divided(parameter) for parameter in model.parameters()):
        raise ModelError(
            "The base model's weights are whole when experts are put on it.",
            received=f"a {type(model).__name__} whose weights are divided among processes (FSDP, DeepSpeed, tensor "
            "parallelism)",
            remedy="put the experts on first, and let the trainer or launcher divide the result",
        )
    of_peft = any(_is_of_peft(module) for module in model.modules())
    if of_peft or any(isinstance(module, XLoraLayer) for module in model.modules()):
        raise ModelError(
            "Experts are put on a plain base model.",
            received=f"a {type(model).__name__} that already carries experts{' of PEFT' if of_peft else ''}",
            remedy="load the base model anew by its own name: that of an adapter brings the adapter; or take what "
            "unload() of PEFT's model returns"
            if of_peft
            else "give the whole model, or call its unload() first",
        )
    route_checkpoints(model, dry_run=True)


def _is_divided(parameter: Tensor) -> bool:
    if hasattr(parameter, "ds_id"):  # DeepSpeed's mark
        return True
    return type(parameter) not in (Tensor, nn.Parameter) and isinstance(parameter, _dtensor())


@functools.cache
def _dtensor() -> type[Tensor]:
    from torch.distributed.tensor import DTensor  # takes long to import, and few need it

    return DTensor


def _is_of_peft(module: object) -> bool:
    return type(module).__module__.startswith("peft.")


def checked_router(config: XLoraConfig, num_experts: int, hidden_size: int) -> type[Router]:
    """The router's kind, once the configuration is known to fit and to name what is registered."""
    config.validate_for(num_experts, hidden_size)
    gating_of(config)
    return router_class(config)


def given_scalings(config: XLoraConfig, sites: Sequence[Site]) -> list[str]:
    """The paths of the layers that are given their scalings by `elsewhere`.

    Raises:
        ConfigurationError: scalings for no layer.
    """
    used = {part for site in sites for part in config.parts_elsewhere(site.path)}
    idle = [part for part in config.elsewhere if part not in used]
    if idle:
        raise ConfigurationError(
            "elsewhere names parts of the paths of adapted layers.",
            received=f"{', '.join(map(repr, idle))}, in none of {', '.join(site.path for site in sites[:3])}, …",
            remedy="name modules that experts adapt; loramix info names these",
        )
    given = [site for site in sites if config.parts_elsewhere(site.path)]
    blocks = [site.path for site in given if isinstance(site.module, BlockMatrices)]
    if blocks:
        raise ConfigurationError(
            "elsewhere gives scalings to whole layers, not to parameters of a mixture-of-experts block.",
            received=f"{blocks[0]!r}",
            remedy="leave the block out of elsewhere",
        )
    return [site.path for site in given]


def check_widths(backbones: Backbones, hidden_size: int) -> None:
    """Raises ModelError: a router for hidden states of one width, and an encoder and a decoder of two."""
    widths = [hidden_size_of(carrier) for carrier in filter(None, backbones)]
    if any(width != hidden_size for width in widths):
        raise ModelError(
            "The router reads the last hidden states of all backbones, which are of one width.",
            received=f"widths of {', '.join(map(str, widths))}, and hidden_size={hidden_size}",
            remedy='mix with router="static", or adapt only one of the two',
        )


def check_embeddings(backbone: PreTrainedModel, hidden_size: int, *, has_encoder: bool) -> None:
    """Raises ModelError: a base model whose router cannot read a text as embeddings of the router's width."""
    remedy = 'mix with router="classifier", or with one of another kind'
    if has_encoder:
        raise ModelError(
            "A router of text reads one text, as input embeddings.",
            received=f"a {type(backbone).__name__} with an encoder: encoder and decoder read a text each",
            remedy=remedy,
        )
    try:
        width = getattr(embedding_of(backbone), "embedding_dim", None)
    except (AttributeError, NotImplementedError):
        width = None
    if width != hidden_size:
        raise ModelError(
            "A router of text reads input embeddings of the width of the hidden states.",
            received=f"{'no embedding of tokens' if width is None else f'embeddings of the width {width}'} in "
            f"{type(backbone).__name__}, whose hidden states have the width {hidden_size}",
            remedy=remedy,
        )


def check_head(head: Site, names: Sequence[str], kind: type[Router]) -> None:
    """Raises UnsupportedAdapterError: a router whose logits are collected before the head has run."""
    if kind.reads == "low-rank activation":
        raise UnsupportedAdapterError(
            "A router that reads a layer's activation ends with the backbone, before the head runs.",
            received=f"expert {', '.join(repr(names[e.expert]) for e in head.experts)} adapts {head.path!r}",
            remedy=f"train the expert without {head.path.rpartition('.')[2]!r} in target_modules, or use "
            'router="classifier"',
        )


def check_blocks(sites: Sequence[Site], names: Sequence[str], kind: type[Router]) -> None:
    """Raises UnsupportedAdapterError: a router that reads one low-rank activation of each token, where there are many.

    A mixture-of-experts block makes one for each of its experts that a token is given to.
    """
    found = [site for site in sites if isinstance(site.module, BlockMatrices)]
    if found and kind.reads == "low-rank activation":
        experts = dict.fromkeys(repr(names[e.expert]) for site in found for e in site.experts)
        raise UnsupportedAdapterError(
            "A router that reads a layer's activation is for layers that each token passes once.",
            received=f"expert {', '.join(experts)} adapts {found[0].path!r}, of a mixture-of-experts block",
            remedy='train the expert without target_parameters, or use router="classifier" or router="static"',
        )
