"""Refusing layers whose experts would see other tokens than the scalings are made for, or would never act.

B, S: batch, sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.errors import ModelError, RoutingError, UnsupportedAdapterError
from loramix.experts.base_model import Backbones, encoder_and_decoder
from loramix.experts.blocks import called_module
from loramix.experts.dry_run import dry_run
from loramix.experts.kept_state import KeptState
from loramix.experts.layer_use import OTHERS, LayerUse, TokenOrder
from loramix.experts.targets import carrier_path, in_head
from loramix.layers.inject import Site


class BaseUses(NamedTuple):
    """What a dry run told of a base model and the layers to adapt.

    Attributes:
        told: whether it was possible; if not, nothing is known before the first forward.
        kept: what the base model keeps outside the cache.
        seeing_cached: the numbers of the layers that see the tokens in the cache too.
        seeing_encoder: of those that see the encoder's tokens: in the encoder, and keys and values of cross-attention.
        orders: how layers hold their tokens, by their numbers, where it is another order than the backbone's.
        apart: the paths of the layers that do not read the routing of a pass: those outside the backbones, and those
            that are given their scalings.
    """

    told: bool
    kept: KeptState
    seeing_cached: tuple[int, ...] = ()
    seeing_encoder: tuple[int, ...] = ()
    orders: Mapping[int, TokenOrder] = MappingProxyType({})
    apart: tuple[str, ...] = ()


def check_uses(
    model: PreTrainedModel,
    backbones: Backbones,
    sites: Sequence[Site],
    names: Sequence[str],
    *,
    routed: bool,
    given: Collection[str] = (),
) -> BaseUses:
    """Check by a dry run what the layers to adapt see.

    Args:
        model: the base model.
        backbones: those that run the passes.
        sites: the layers to adapt.
        names: the experts' names, for errors.
        routed: whether scalings of the backbone's tokens reach the layers; without, a layer may see any tokens.
        given: the paths of layers that are given their scalings, as if they were not routed.

    Returns:
        what the dry run told.

    Raises:
        UnsupportedAdapterError: a layer whose weight is read instead of calling it, one that returns more than a
            tensor, or, if `routed`, one that sees other tokens than the backbone's, or none.
        ModelError: if `routed`, a forward that goes on where the one before it stopped, without any cache; or an
            encoder and a decoder of which nothing can be told.
    """
    carrier, has_encoder = backbones.main, backbones.encoder is not None
    run = dry_run(carrier)
    kept = KeptState.by_names(carrier) if run is None else run.kept
    if routed and kept.always:
        raise ModelError(
            "The forward of a mixture's base model depends on its arguments alone: the two passes run one after the "
            "other.",
            received=f"a {type(carrier).__name__}, whose forward without a cache depends on the text read before",
            remedy='use another base model, or router="static", which needs one pass',
        )
    uses = uses_of(model, backbones, sites)
    told = uses is not None
    if not told and routed and model.config.is_encoder_decoder:
        raise ModelError(
            "Of an encoder–decoder it is known whose tokens each layer sees.",
            received=f"a {type(model).__name__}, whose parts could not be tried",
            remedy='mix with router="static", which has one weight for all tokens',
        )
    if uses is None:
        around = [*outside(model, backbones, sites), *_embedded_around(model, carrier, sites)]
        uses = {site.path: LayerUse("other tokens", outside=True) for site in around}
    found_in = {
        path: refusal(use, routed=routed and path not in given, has_encoder=has_encoder) for path, use in uses.items()
    }
    refused = {path: found for path, found in found_in.items() if found is not None}
    if refused:
        rule, _, remedy = next(iter(refused.values()))
        alike = {path: found.reason for path, found in refused.items() if found.rule == rule}
        experts = dict.fromkeys(repr(names[e.expert]) for site in sites if site.path in alike for e in site.experts)
        shown = "; ".join(f"{path!r} {reason}" for path, reason in list(alike.items())[:3])
        more = f"; and {len(alike) - 3} more" if len(alike) > 3 else ""
        ends = ", ".join(repr(end) for end in dict.fromkeys(".".join(path.split(".")[-2:]) for path in alike))
        raise UnsupportedAdapterError(
            rule,
            received=f"expert {', '.join(experts)} on a {type(carrier).__name__}: {shown}{more}",
            remedy=f"train the expert without {ends} in target_modules{remedy}",
        )
    seen = [uses.get(site.path, LayerUse()) for site in sites]
    return BaseUses(
        told,
        kept,
        seeing_cached=tuple(n for n, use in enumerate(seen) if use.sees == "cached tokens"),
        seeing_encoder=tuple(n for n, use in enumerate(seen) if use.sees == "encoder tokens"),
        orders={n: use.order for n, use in enumerate(seen) if use.order != TokenOrder()},
        apart=tuple(s.path for s, use in zip(sites, seen, strict=True) if use.outside or s.path in given),
    )


def outside(model: PreTrainedModel, backbones: Backbones, sites: Sequence[Site]) -> list[Site]:
    """The sites that lie in none of the backbones, and not in the head."""
    inside = {id(module) for backbone in filter(None, backbones) for module in backbone.modules()}
    modules = dict(model.named_modules())
    return [s for s in sites if id(called_module(s.module)) not in inside and not in_head(modules, s.path)]


def _embedded_around(model: PreTrainedModel, carrier: PreTrainedModel, sites: Sequence[Site]) -> list[Site]:
    """The embedding of the texts, if it is adapted: a model of several parts calls that of its backbone by itself."""
    inside = set(carrier.modules())
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    is_alone = all(part in inside or carrier in part.modules() for part in parts)
    if is_alone or encoder_and_decoder(model) is not None:  # these embed their texts themselves
        return []
    return [site for site in sites if site.module is model.get_input_embeddings()]


def uses_of(model: PreTrainedModel, backbones: Backbones, sites: Sequence[Site]) -> dict[str, LayerUse] | None:
    """What dry runs show of these layers, by the sites' paths; None where none of a backbone is possible.

    Args:
        model: the base model.
        backbones: those that run the passes.
        sites: the layers; that of a head lies outside the backbone.
    """
    around = outside(model, backbones, sites)
    encoder = set[int]() if backbones.encoder is None else {id(module) for module in backbones.encoder.modules()}
    of_encoder = [site for site in sites if id(called_module(site.module)) in encoder]
    of_main = [site for site in sites if site not in around and site not in of_encoder]
    parts = [_uses_in(model, backbones.main, of_main)]
    if backbones.encoder is not None:
        parts.append(_uses_in(model, backbones.encoder, of_encoder))
    found: dict[str, LayerUse] = {}
    for part in parts:
        if part is None:
            return None
        found |= part
    for site in of_encoder:
        if found[site.path].sees == "tokens":
            found[site.path] = replace(found[site.path], sees="encoder tokens")
    return found | _uses_around(model, around)


def _uses_around(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, LayerUse]:
    """The same of layers outside the backbones, as far as the models that they lie under can be run alone."""
    modules, found = dict(model.named_modules()), dict[str, LayerUse]()
    for site in sites:
        above = carrier_path(modules, site.path)
        run = dry_run(modules[above])
        use = None if run is None else run.get(site.path.removeprefix(f"{above}."))
        found[site.path] = replace(use or LayerUse("other tokens"), outside=True)
    return found


def _uses_in(model: PreTrainedModel, carrier: PreTrainedModel, sites: Sequence[Site]) -> dict[str, LayerUse] | None:
    """The same of one backbone's layers, and of a head."""
    if not sites:
        return {}
    own, base = dry_run(carrier), cast(PreTrainedModel, model.base_model)
    within_base, within_model = _path_in(base, carrier), _path_in(model, carrier)
    around = dry_run(base, within_base) if within_base else None  # of several parts
    if own is None and around is None:
        return None
    here = {id(module): path for path, module in carrier.named_modules()}
    embeddings = [] if around is not None else [site.path for site in _embedded_around(model, carrier, sites)]
    found: dict[str, LayerUse] = {}
    for site in sites:
        path = here.get(id(called_module(site.module)))
        outer = None if path is None or around is None else around.get(f"{within_base}.{path}")
        use = outer if path is None or own is None else own.get(path)
        if path is None:  # a head
            whole = dry_run(model, within_model or "")
            if whole is None:
                return None
            found[site.path] = replace(whole[site.path], outside=False)
        elif use is not None:
            found[site.path] = replace(use, outside=site.path in embeddings or (outer is not None and outer.outside))
    return found


def _path_in(model: nn.Module, part: nn.Module) -> str | None:
    return next((path for path, module in model.named_modules() if module is part), None)


class Refusal(NamedTuple):
    """Why experts cannot adapt a layer.

    Attributes:
        rule: what must hold.
        reason: what the layer does instead, after its path.
        remedy: what else can be done than to leave the layer out.
    """

    rule: str
    reason: str
    remedy: str = ""


def refusal(use: LayerUse, *, routed: bool, has_encoder: bool = False) -> Refusal | None:
    """Why experts cannot adapt a layer of this use; None where they can.

    Args:
        use: what a dry run showed.
        routed: as for `check_uses`.
        has_encoder: whether scalings are made of an encoder's tokens too.
    """
    if use.is_bypassed:
        rule = "Experts act in a layer that the base model calls."
        return Refusal(rule, "is not called: the base model reads its weight")
    if use.returns_tuple:
        return Refusal("Experts adapt layers that return one tensor.", "returns several values")
    if routed and use.outside:
        return Refusal(_RULE, "is called outside the backbone", _REMEDY)
    if not routed or use.sees in ("tokens", "cached tokens") or (has_encoder and use.sees == "encoder tokens"):
        return None
    return Refusal(_RULE, _described(use), _REMEDY)


_RULE = "A router gives scalings to the tokens of the backbone: an adapted layer sees these, each once."
_REMEDY = (
    ', give it scalings with XLoraConfig(elsewhere={"…": "uniform"}), or mix with router="static", which has one '
    "weight for all tokens"
)


def _described(use: LayerUse) -> str:
    if use.sees == "nothing":
        return "is not called"
    other = next((each for each in use.tokens if each not in TokenOrder().sizes(*use.texts)), None)
    if other is None:
        return "sees the tokens of the texts in another order"
    whose = "those of an encoder" if OTHERS in other else "of another order or number"
    return f"sees {other} where the texts are {use.texts}: {whose}"


def refuse_ambiguous(tokens: torch.Size, inputs: Mapping[str, Any]) -> None:
    """Refuse a forward whose sizes do not tell whose tokens a layer sees, where no dry run has told it.

    Args:
        tokens: (B, S).
        inputs: the arguments of the backbone's forward by name.

    Raises:
        RoutingError: as many texts as tokens, or another argument with as many tokens.
    """
    batch, length = tokens
    alike = [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == length and name != "inputs_embeds"
    ]
    if (batch == length and batch > 1) or (alike and length > 1):
        raise RoutingError(
            "Whose tokens a layer of this base model sees is told by sizes that differ.",
            received=f"{batch} texts of {length} tokens" + "".join(f", {name} of {length} too" for name in alike),
            remedy="pad the texts to another length, or use another batch size",
        )
