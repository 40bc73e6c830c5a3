"""Another router in a mixture: the experts and the gating stay."""

from __future__ import annotations

import copy
from typing import cast

from transformers import PreTrainedModel

from loramix.config.xlora import OF_THE_CLASSIFIER, XLoraConfig
from loramix.errors import UnsupportedOperationError
from loramix.model.build import XLoraModel
from loramix.model.checks import check_embeddings
from loramix.model.peft_methods import layers_of
from loramix.passes.state import state_of
from loramix.routers.router import Router, RouterSizes, TextRouter, router_class


def sizes_of_mixture(model: XLoraModel) -> RouterSizes:
    """What a router of this mixture is built for."""
    state = state_of(model)
    ranks = [layer.stack.expert_of_rank[: layer.stack.rank] for layer in layers_of(model.get_base_model()).values()]
    experts = tuple(tuple(int(expert) for expert in each) for each in ranks)
    return RouterSizes(state.hidden_size, len(experts), len(state.names), experts)


def config_with_router(model: XLoraModel, kind: str) -> XLoraConfig:
    """The mixture's configuration with another kind of router, and without what belongs to the one it has.

    Raises:
        ConfigurationError: an unknown kind, or settings that mean nothing for it.
        UnsupportedOperationError: a mixture with layers that such a router cannot scale.
        ModelError: a base model without input embeddings of the width of its hidden states, for a router of text.
    """
    state = state_of(model)
    config = copy.deepcopy(state.config)
    default = XLoraConfig(hidden_size=config.hidden_size, adapters=config.adapters)
    for name in (*OF_THE_CLASSIFIER, "scaling_pass_value"):
        setattr(config, name, getattr(default, name))
    config.router = kind
    config.validate_for(len(state.names), state.hidden_size)
    found = router_class(config)
    if issubclass(found, TextRouter):
        check_embeddings(cast(PreTrainedModel, model.base_model), state.hidden_size, has_encoder=state.has_encoder)
    if found.reads == "low-rank activation" and (state.head is not None or state.blocks):
        place = state.head if state.head is not None else min(state.blocks)
        raise UnsupportedOperationError(
            "A router that reads a layer's activation scales layers of the backbone that each token passes once.",
            received=f"router={kind!r} for a mixture that adapts {place!r}",
            remedy='use router="static", or keep the classifier',
        )
    return config


def replace_router(model: XLoraModel, router: Router, config: XLoraConfig) -> None:
    """Give a mixture this router; the next forward uses it.

    Args:
        model: the mixture.
        router: built for `sizes_of_mixture`.
        config: as `config_with_router` gives it.
    """
    state, base = state_of(model), model.get_base_model()
    router.requires_grad_(any(each.requires_grad for each in state.router.parameters())).train(model.training)
    delattr(base, state.router.attribute)
    base.add_module(router.attribute, router)
    state.router, state.config = router, config
