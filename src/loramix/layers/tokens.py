"""Refusing layers whose experts would see other tokens than the scalings are made for, or would never act.

B, S: batch, sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramix.errors import RoutingError, UnsupportedAdapterError
from loramix.experts.dry_run import OTHERS, TEXTS, TOKENS, LayerUse, dry_run
from loramix.layers.inject import Site


def check_uses(carrier: PreTrainedModel, sites: Sequence[Site], names: Sequence[str], *, routed: bool) -> bool:
    """Check by a dry run what the layers to adapt see.

    Args:
        carrier: the backbone that runs the passes.
        sites: the layers to adapt.
        names: the experts' names, for errors.
        routed: whether scalings of the backbone's tokens reach the layers; without, a layer may see any tokens.

    Returns:
        whether the dry run was possible; if not, nothing is known before the first forward.

    Raises:
        UnsupportedAdapterError: a layer whose weight is read instead of calling it, one that returns more than a
            tensor, or, if `routed`, one that sees other tokens than the backbone's, or none.
    """
    uses = dry_run(carrier)
    if uses is None:
        return False
    here = {id(module): path for path, module in carrier.named_modules()}
    found = {site.path: uses[here[id(site.module)]] for site in sites if here.get(id(site.module)) in uses}
    by_path = {site.path: site for site in sites}

    def refuse(wrong: Callable[[LayerUse], bool], rule: str, what: Callable[[LayerUse], str], remedy: str) -> None:
        paths = [path for path, use in found.items() if wrong(use)]
        if paths:
            experts = dict.fromkeys(repr(names[e.expert]) for path in paths for e in by_path[path].experts)
            shown = "; ".join(f"{path!r} {what(found[path])}" for path in paths[:3])
            more = f"; and {len(paths) - 3} more" if len(paths) > 3 else ""
            ends = ", ".join(repr(end) for end in dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
            raise UnsupportedAdapterError(
                rule,
                received=f"expert {', '.join(experts)} on a {type(carrier).__name__}: {shown}{more}",
                remedy=remedy.format(names=ends),
            )

    refuse(
        lambda use: use.is_bypassed,
        "Experts act in a layer that the base model calls.",
        lambda use: "is not called: the base model reads its weight",
        "train the expert without {names} in target_modules",
    )
    refuse(
        lambda use: use.returns_tuple,
        "Experts adapt layers that return one tensor.",
        lambda use: "returns several values",
        "train the expert without {names} in target_modules",
    )
    if routed:
        refuse(
            lambda use: use.sees != "tokens",
            "A router gives scalings to the tokens of the backbone: an adapted layer sees these, in their order.",
            _described,
            'train the expert without {names} in target_modules, or mix with router="static", which has one weight for '
            "all tokens",
        )
    return True


def _described(use: LayerUse) -> str:
    if use.sees == "nothing":
        return "is not called"
    other = next(each for each in use.tokens if each not in ((TEXTS, TOKENS), (TEXTS * TOKENS,)))
    whose = "those of an encoder" if OTHERS in other else "of another order or number"
    return f"sees {other} where the texts are ({TEXTS}, {TOKENS}): {whose}"


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
