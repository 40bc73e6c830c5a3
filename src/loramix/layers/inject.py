"""Find the layers that experts adapt, number them, replace them.

Everything is checked before the first layer is replaced, so that a refused expert leaves the base model as it was.
L: adapted layers, numbered 0..L-1 in the order of `named_modules()`; the numbering is part of the checkpoint format. A
quantiser may have put layers back in another order, which does not count. Each adapted parameter of a
mixture-of-experts block is a layer, numbered where its block stands, in the order of the block's parameters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from loramix.config.folder import CONFIG_NAME
from loramix.errors import AdapterMismatchError, ModelError, UnsupportedAdapterError
from loramix.experts.adapter import Adapter, LoraWeights, of_another_base, refuse_infinite
from loramix.experts.base_layers import (
    Kind,
    device_of,
    expected_shapes,
    is_quantised,
    kind_of,
    refuse_module,
    rounds_its_input,
)
from loramix.experts.base_model import Backbones, encoder_and_decoder, in_declared_order
from loramix.experts.base_weights import check_base_weights, resizing_remedy
from loramix.experts.blocks import COMPUTED, BlockMatrices, with_matrices
from loramix.experts.mismatch import absent_modules, shown
from loramix.experts.targets import adaptable, carrier_path, in_head, targeted
from loramix.files.tensors import all_finite
from loramix.layers.layer import XLoraBlock, XLoraLayer, fill, new_layer
from loramix.layers.stack import LayerExpert
from loramix.routers.router import RouterSizes


@dataclass(frozen=True)
class Site:
    """One layer to adapt: where it is, and the experts that adapt it."""

    path: str
    module: nn.Module
    experts: tuple[LayerExpert, ...]

    @property
    def expert_of_rank(self) -> tuple[int, ...]:
        """The expert of each rank column, without the columns of LoRA biases."""
        return tuple(e.expert for e in self.experts for _ in range(e.rank))


def plan(model: PreTrainedModel, adapters: Sequence[Adapter]) -> list[Site]:
    """The layers that at least one expert adapts, in the order of `named_modules()` of the model's class.

    Args:
        model: the base model.
        adapters: the experts, by the base model's names (`on_base`).

    Raises:
        AdapterMismatchError: an expert of another base: other modules, or other shapes.
        UnsupportedAdapterError: an expert that reaches into a layer that no mixture can adapt.
    """
    modules = with_matrices(model)
    base = _Base(modules, adaptable(modules))
    for adapter in adapters:
        _check(adapter, base)
        check_base_weights(model, adapter)
    paths = [path for path in modules if any(path in adapter.weights for adapter in adapters)]
    if any(is_quantised(modules[path]) for path in paths):
        paths = in_declared_order(model, paths)
    return [Site(path, modules[path], tuple(_experts_at(path, adapters))) for path in paths]


def router_sizes(sites: Sequence[Site], hidden_size: int, experts: int) -> RouterSizes:
    """What the router of a mixture on these layers is built for."""
    return RouterSizes(hidden_size, len(sites), experts, tuple(site.expert_of_rank for site in sites))


def _experts_at(path: str, adapters: Sequence[Adapter]) -> Iterator[LayerExpert]:
    for expert, adapter in enumerate(adapters):
        if path in adapter.weights:
            yield LayerExpert(expert, adapter.weights[path], adapter.scaling(path), adapter.config.lora_dropout)


class _Base:
    """A base model's modules, and what experts' tensors must be there; of many experts, most ask the same.

    Args:
        modules: by path.
        kinds: of those that experts can adapt.
    """

    def __init__(self, modules: Mapping[str, nn.Module], kinds: Mapping[str, Kind]) -> None:
        self.modules, self.kinds = modules, kinds
        self._fitting: set[tuple[object, ...]] = set()

    def check(self, adapter: Adapter, path: str, weights: LoraWeights) -> None:
        """Raises UnsupportedAdapterError, AdapterMismatchError: the module takes no such tensors."""
        bias, magnitude = weights.bias, weights.magnitude
        asked = (
            path,
            weights.A.shape,
            weights.B.shape,
            None if bias is None else bias.numel(),
            None if magnitude is None else magnitude.numel(),
            weights.embedding,
        )
        if asked not in self._fitting:
            refuse_module(self.modules[path], path, adapter.name, dora=magnitude is not None)
            _check_shapes(adapter, path, self.modules[path], weights)
            self._fitting.add(asked)


def _check(adapter: Adapter, base: _Base) -> None:
    modules = base.modules
    absent = absent_modules(adapter, modules)
    if absent is not None:
        raise absent
    for path, weights in adapter.weights.items():
        base.check(adapter, path, weights)
    missing = [path for path in targeted(modules, base.kinds, adapter.config) if path not in adapter.weights]
    if missing:
        _check_pruned(adapter, missing)


def _check_pruned(adapter: Adapter, missing: Sequence[str]) -> None:
    """Warn of modules that the configuration names and the file has no tensors for: they stay as they are.

    Where it has none for the last blocks of several, the base model that it was trained on had fewer.
    """
    last: dict[str, int] = {}
    for path in adapter.weights:
        blocks, number = _block(path)
        last[blocks] = max(number, last.get(blocks, -1))
    beyond = [path for path in missing for blocks, number in [_block(path)] if number > last.get(blocks, number)]
    if beyond:
        error = of_another_base(
            adapter,
            f"{shown(beyond)}: target_modules or target_parameters names it in this base model, and the file has no "
            "tensors for it, nor for a later block",
        )
        remedy = (
            f"{error.remedy}; where these blocks are to stay as they are, set layers_to_transform or exclude_modules"
        )
        raise AdapterMismatchError(error.rule, received=error.received, remedy=f"{remedy} in {CONFIG_NAME}")
    warnings.warn(
        f"Expert {adapter.name!r} has no tensors for {len(missing)} of the modules that its configuration names, "
        f"{shown(missing)}: it leaves them as they are.",
        stacklevel=6,
    )


def _block(path: str) -> tuple[str, int]:
    """The list of blocks that a module is in, and its block's number; -1 outside of blocks."""
    found = re.match(r"(.*?)\.(\d+)(?:\.|$)", path)
    return (found[1], int(found[2])) if found else ("", -1)


def _check_shapes(adapter: Adapter, path: str, module: nn.Module, weights: LoraWeights) -> None:
    rank = weights.rank
    found: dict[str, object] = {"A": tuple(weights.A.shape), "B": tuple(weights.B.shape)}
    shapes = expected_shapes(module, rank)
    expected: dict[str, object] = dict(zip("AB", shapes, strict=True))
    is_embedding = kind_of(module) == "embedding"
    if weights.embedding != is_embedding:
        kinds = {True: "an embedding", False: "no embedding"}
        found["of"], expected["of"] = kinds[weights.embedding], kinds[is_embedding]
    for part in ("bias", "magnitude"):
        tensor = getattr(weights, part)
        if tensor is not None:
            found[part], expected[part] = (tensor.numel(),), (shapes[1][0],)
    if found != expected:
        remedy = of_another_base(adapter, "").remedy
        if isinstance(module, nn.Embedding) and weights.embedding and found["B"] == expected["B"]:
            remedy = f"{resizing_remedy(weights.A.shape[1], module.num_embeddings)}; or {remedy}"
        raise AdapterMismatchError(
            "An expert's matrices fit the base model's layer.",
            received=f"expert {adapter.name!r}, module {path!r}: expected {expected}, found {found}",
            remedy=remedy,
        )


def find_backbones(model: PreTrainedModel, sites: Sequence[Site], names: Sequence[str]) -> Backbones:
    """The `PreTrainedModel` that runs the passes: the nearest above the layers; or a decoder and its encoder.

    Layers may lie outside, as in a vision tower.

    Args:
        model: the model given to `get_peft_model`.
        sites: the layers to adapt, without those that are given their scalings.
        names: the experts' names, for errors.

    Raises:
        UnsupportedAdapterError: an expert adapts what runs after the backbone, other than the output embeddings.
        ModelError: the forward of such a model was replaced on the object.
    """
    modules = dict(model.named_modules())
    after = [site for site in sites if in_head(modules, site.path)]
    head = head_site(model, after)
    for site in after:
        if site is not head:
            experts = ", ".join(repr(names[e.expert]) for e in site.experts)
            raise UnsupportedAdapterError(
                "What runs after both passes cannot be routed, except a head that gives each token its logits.",
                received=f"expert {experts} adapts {site.path!r} of a {type(model).__name__}",
                remedy=f"train the expert without {site.path.rpartition('.')[2]!r} in target_modules",
            )
    found = {carrier_path(modules, site.path): None for site in sites if site not in after}
    backbones = _backbones(model, [modules[path] for path in sorted(found)])
    for carrier in filter(None, backbones):
        if "forward" in carrier.__dict__ and "_old_forward" not in carrier.__dict__:
            raise ModelError(
                "Both passes run in the forward of the backbone's class.",
                received=f"a {type(carrier).__name__} whose forward was replaced on the object itself",
                remedy="put the experts on first, and replace or compile the forward afterwards",
            )
    return backbones


def _backbones(model: PreTrainedModel, carriers: Sequence[nn.Module]) -> Backbones:
    """The backbones of a model whose adapted layers lie under these models: of several, those that read the text."""
    both = encoder_and_decoder(model)
    if len(carriers) == 1 and (both is None or carriers[0] is not both.main):
        return Backbones(cast(PreTrainedModel, carriers[0]))  # of an encoder–decoder, maybe the encoder alone
    if both is not None:
        return both
    modules = dict(model.named_modules())
    embedding = model.get_input_embeddings()
    path = next((path for path, module in modules.items() if module is embedding), None)
    text = model.base_model if path is None or not carriers else modules[carrier_path(modules, path)]
    return Backbones(cast(PreTrainedModel, text))


def refuse_meta(sites: Sequence[Site]) -> None:
    """Raises ModelError: layers whose weights are neither in memory, nor brought for each call of the layer."""
    absent = [site.path for site in sites if device_of(site.module).type == "meta"]
    if absent:
        raise ModelError(
            "The weights of adapted layers are in memory, or offloaded layer by layer by accelerate.",
            received=f"weights on the meta device, such as those of {absent[0]!r}",
            remedy="load the base model's weights; to offload them, use device_map or cpu_offload, without "
            "preload_module_classes",
        )


def head_site(model: PreTrainedModel, sites: Sequence[Site]) -> Site | None:
    """The site of the output embeddings, which run after the backbone; None if no expert adapts them."""
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    return next((site for site in sites if site.module is head and in_head(modules, site.path)), None)


def adapt(
    sites: Sequence[Site], names: Sequence[str], *, training: Collection[int], dtype: torch.dtype
) -> dict[str, XLoraLayer]:
    """The adapted layers by their paths, ready to take their places; the base model is not touched.

    Args:
        sites: as `plan` gives them.
        names: the experts' names, for errors.
        training: the numbers of the experts that train: they, and those in the same layers, are float32 beside a base
            of any dtype.
        dtype: the base model's, for layers whose own weight is not of a floating dtype.

    Raises:
        CorruptCheckpointError: an expert with an infinite number or NaN.
        UnsupportedAdapterError: DoRA on a layer without one weight that tells what it computes.
    """
    _refuse_rounded(sites, names)
    layers: dict[str, XLoraLayer] = {}
    layouts: dict[object, int] = {}
    for number, site in enumerate(sites):
        trains = any(e.expert in training for e in site.experts)
        own_dtype = torch.float32 if trains else _dtype(site.module, dtype)
        layer = new_layer(site.module, site.experts, number, dtype=own_dtype)
        layer.stack.layout = layouts.setdefault(layer.stack.arrangement, len(layouts))
        layers[site.path] = layer
    fill(list(layers.values()), [site.experts for site in sites])
    for path, layer in layers.items():
        if not all_finite(layer.stack.parameters()):
            for expert, weights in layer.stack.parts.items():
                refuse_infinite(names[expert], {path: weights})
        layer.stack.divide(training)
    return layers


def _refuse_rounded(sites: Sequence[Site], names: Sequence[str]) -> None:
    for site in sites:
        experts = [names[e.expert] for e in site.experts if e.weights.magnitude is not None]
        if experts and rounds_its_input(site.module):
            raise UnsupportedAdapterError(
                "DoRA needs the weight that a layer multiplies with.",
                received=f"expert {', '.join(map(repr, experts))} with DoRA on {site.path!r}: a "
                f"{type(site.module).__name__} that rounds its input to steps of a fixed size",
                remedy="load the base model with weights quantised alone, or train the expert without use_dora",
            )


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Of a plain weight its own; a quantised one is stored in another dtype than its layer computes in."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and not is_quantised(module) and weight.dtype in COMPUTED:
        return weight.dtype
    return default


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where the model has its module `path`."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    module.train(holder.training)
    setattr(holder, name, module)


def put_on(model: nn.Module, path: str, layer: XLoraLayer) -> None:
    """Put an adapted layer where its base layer is; that of a parameter beside its block."""
    if not isinstance(layer.base_layer, BlockMatrices):
        replace(model, path, layer)
        return
    place, _, name = path.rpartition(".")
    block = model.get_submodule(place)
    if not isinstance(block, XLoraBlock):
        block = XLoraBlock(block)
        replace(model, place, block)
    block.add_module(name, layer)
    layer.train(block.training)


def take_off(model: nn.Module, path: str, layer: XLoraLayer) -> None:
    """Put the base layer back in its place."""
    base = layer.base_layer
    if isinstance(base, BlockMatrices):
        replace(model, path.rpartition(".")[0], base.block)
    else:
        replace(model, path, base)
