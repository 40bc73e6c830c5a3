"""What loramix can do with a base model, before there is an expert: which layers, with which routers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from loramix.config.lora import LoraConfig
from loramix.errors import LoramixError
from loramix.experts.base_layers import why_unadaptable
from loramix.experts.blocks import with_matrices
from loramix.experts.dry_run import hidden_size_of
from loramix.experts.targets import ALL_LINEAR, new_targets
from loramix.files.base_models import one_line
from loramix.layers.inject import Site, find_backbones
from loramix.layers.tokens import refusal, uses_of


@dataclass(frozen=True)
class TargetGroup:
    """Targeted layers whose paths differ in numbers only, and that are judged alike.

    Attributes:
        name: the path, with "*" for each number.
        layers: how many there are.
        problem: why a router cannot scale experts here; None if it can.
        works_with_static: whether `router="static"` can.
    """

    name: str
    layers: int
    problem: str | None
    works_with_static: bool


@dataclass(frozen=True)
class Compatibility:
    """What a base model can carry.

    Attributes:
        model: its class.
        backbone: the class that the passes run in, or two, of an encoder and its decoder; None if there is none for
            these targets.
        hidden_size: of the backbone's last hidden state; None if there is no backbone.
        problem: why the model cannot be a mixture's base with these targets, whatever the layers; None if it can.
        dry_run: whether a dry run was possible. If not, what the layers see is only known in a forward.
        targets: the targeted layers.
    """

    model: str
    backbone: str | None
    hidden_size: int | None
    problem: str | None
    dry_run: bool
    targets: tuple[TargetGroup, ...]

    @property
    def works(self) -> bool:
        """Whether a mixture with any router can be built, with experts on all of the targeted layers."""
        return self.problem is None and all(group.problem is None for group in self.targets)

    @property
    def working_targets(self) -> list[str]:
        """`target_modules` that leave out what does not work; empty if nothing is left."""
        if self.problem is not None:
            return []
        bad = [_end(group.name) for group in self.targets if group.problem is not None]
        return sorted({_end(group.name) for group in self.targets if group.problem is None} - set(bad))

    def to_dict(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return {**asdict(self), "works": self.works, "working_targets": self.working_targets}


def check_base(base: PreTrainedModel, target_modules: str | Sequence[str] = ALL_LINEAR) -> Compatibility:
    """Whether experts on these modules would work with a base model; it is not changed, and may be without weights.

    Args:
        base: the base model.
        target_modules: as in `LoraConfig`; names may also be those of `target_parameters`.

    Raises:
        ConfigurationError: targets that no module of the model matches.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    modules = with_matrices(base)
    parameters = None if isinstance(targets, str) else targets
    config = LoraConfig(target_modules=targets, target_parameters=parameters)
    sites = [Site(path, modules[path], ()) for path in new_targets(base, config)]
    name, reasons = type(base).__name__, {site.path: why_unadaptable(site.module, site.path) for site in sites}
    try:
        backbones = find_backbones(base, sites, [])
        hidden_size = hidden_size_of(base)
    except (LoramixError, AttributeError) as error:
        problem = error.received if isinstance(error, LoramixError) else one_line(error)
        return Compatibility(
            name, None, None, problem, False, _groups([(s.path, reasons[s.path], False) for s in sites])
        )
    uses, has_encoder = uses_of(base, backbones, sites), backbones.encoder is not None
    answers: list[tuple[str, str | None, bool]] = []
    for site in sites:
        use = (uses or {}).get(site.path)
        always = refusal(use, routed=False) if use else None
        routed = refusal(use, routed=True, has_encoder=has_encoder) if use else None
        reason = reasons[site.path] or (routed and routed.reason)
        answers.append((site.path, reason, not (reasons[site.path] or always)))
    backbone = " and ".join(dict.fromkeys(type(carrier).__name__ for carrier in backbones if carrier is not None))
    return Compatibility(name, backbone, hidden_size, None, uses is not None, _groups(answers))


def _groups(answers: Sequence[tuple[str, str | None, bool]]) -> tuple[TargetGroup, ...]:
    found: dict[tuple[str, str | None, bool], int] = {}
    for path, problem, static in answers:
        key = (re.sub(r"(?<=\.)\d+(?=\.)|(?<=\.)\d+$", "*", path), problem, static)
        found[key] = found.get(key, 0) + 1
    return tuple(TargetGroup(name, layers, problem, static) for (name, problem, static), layers in found.items())


def _end(name: str) -> str:
    """What `target_modules` matches by: the last part, or the last two where that says nothing by itself."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("dense", "*", "linear") else parts[-1]
